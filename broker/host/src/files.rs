//! Opening files of granted folders. What leads out of them, or must not be written, is refused by wasmtime; here it is
//! also counted and named in the log.

use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource};
use wasmtime_wasi::filesystem::WasiFilesystemView;
use wasmtime_wasi::p2::bindings::filesystem::types::{
    Descriptor, DescriptorFlags, ErrorCode, HostDescriptor, OpenFlags, PathFlags,
};

use crate::guest::Guest;

type OpenAt = (Resource<Descriptor>, PathFlags, String, OpenFlags, DescriptorFlags);

/// Takes the place of the function that wasmtime links.
pub(crate) fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    linker.allow_shadowing(true);
    linker.instance("wasi:filesystem/types@0.2.12")?.func_wrap_async(
        "[method]descriptor.open-at",
        |mut store: StoreContextMut<'_, Guest>, (folder, path_flags, path, open_flags, flags): OpenAt| {
            Box::new(async move {
                let guest = store.data_mut();
                let name = path.clone();
                let opened = guest.filesystem().open_at(folder, path_flags, path, open_flags, flags).await;
                let code = match opened {
                    Ok(file) => return Ok((Ok::<_, ErrorCode>(file),)),
                    Err(error) => error.downcast()?,
                };
                if matches!(code, ErrorCode::Access | ErrorCode::NotPermitted | ErrorCode::ReadOnly) {
                    guest.denials.note(format_args!("opening {name:?}"));
                }
                Ok((Err(code),))
            })
        },
    )?;
    linker.allow_shadowing(false);
    Ok(())
}
