//! Opening files of granted folders. What leads out of them, or must not be written, is refused by wasmtime; here it is
//! also counted and named in the log, and the number of open files has a bound.

use wasmqtt_protocol::text::escaped;
use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource, ResourceType};
use wasmtime_wasi::filesystem::WasiFilesystemView;
use wasmtime_wasi::p2::bindings::filesystem::types::{
    Descriptor, DescriptorFlags, ErrorCode, HostDescriptor, OpenFlags, PathFlags,
};
use wasmtime_wasi::p2::{DynInputStream, DynOutputStream, ReaddirIterator};

use crate::HostError;
use crate::bindings::NAME_BYTES_MAX;
use crate::guest::Guest;
use crate::shadow::linked_name;

type OpenAt = (Resource<Descriptor>, PathFlags, String, OpenFlags, DescriptorFlags);
type Opened<T> = wasmtime::Result<(Result<Resource<T>, ErrorCode>,)>;

/// Takes the place of the functions that wasmtime links.
pub(crate) fn add_to_linker(linker: &mut Linker<Guest>) -> Result<(), HostError> {
    let name = linked_name(linker, "wasi:filesystem/types", "[method]descriptor.open-at")?;
    linker.allow_shadowing(true);
    let added = shadow(linker, &name);
    linker.allow_shadowing(false);
    added.map_err(|error| HostError::new(format!("{error:#}")))
}

fn shadow(linker: &mut Linker<Guest>, name: &str) -> wasmtime::Result<()> {
    let mut types = linker.instance(name)?;
    types.func_wrap_async("[method]descriptor.open-at", |mut store: StoreContextMut<'_, Guest>, what: OpenAt| {
        Box::new(async move { open_at(store.data_mut(), what).await })
    })?;
    types.func_wrap(
        "[method]descriptor.read-via-stream",
        |mut store: StoreContextMut<'_, Guest>, (file, offset): (Resource<Descriptor>, u64)| {
            let guest = store.data_mut();
            let stream = guest.filesystem().read_via_stream(borrowed(&file), offset);
            stream_of::<DynInputStream>(guest, file, stream.map_err(wasmtime_wasi::TrappableError::downcast))
        },
    )?;
    types.func_wrap(
        "[method]descriptor.write-via-stream",
        |mut store: StoreContextMut<'_, Guest>, (file, offset): (Resource<Descriptor>, u64)| {
            let guest = store.data_mut();
            let stream = guest.filesystem().write_via_stream(borrowed(&file), offset);
            stream_of::<DynOutputStream>(guest, file, stream.map_err(wasmtime_wasi::TrappableError::downcast))
        },
    )?;
    types.func_wrap(
        "[method]descriptor.append-via-stream",
        |mut store: StoreContextMut<'_, Guest>, (file,): (Resource<Descriptor>,)| {
            let guest = store.data_mut();
            let stream = guest.filesystem().append_via_stream(borrowed(&file));
            stream_of::<DynOutputStream>(guest, file, stream.map_err(wasmtime_wasi::TrappableError::downcast))
        },
    )?;
    types.func_wrap_async(
        "[method]descriptor.read-directory",
        |mut store: StoreContextMut<'_, Guest>, (folder,): (Resource<Descriptor>,)| {
            Box::new(async move { read_directory(store.data_mut(), folder).await })
        },
    )?;
    types.resource(
        "directory-entry-stream",
        ResourceType::host::<ReaddirIterator>(),
        |mut store: StoreContextMut<'_, Guest>, rep| store.data_mut().close_listing(Resource::new_own(rep)),
    )?;
    types.resource("descriptor", ResourceType::host::<Descriptor>(), |mut store: StoreContextMut<'_, Guest>, rep| {
        store.data_mut().close_file(Resource::new_own(rep))
    })
}

fn borrowed<T: 'static>(resource: &Resource<T>) -> Resource<T> {
    Resource::new_borrow(resource.rep())
}

async fn open_at(guest: &mut Guest, (folder, path_flags, path, open_flags, flags): OpenAt) -> Opened<Descriptor> {
    if !guest.may_open_file() {
        return Ok((Err(ErrorCode::Quota),));
    }
    let name = path.clone();
    let opened = guest.filesystem().open_at(folder, path_flags, path, open_flags, flags).await;
    let code = match opened {
        Ok(file) => {
            guest.file_opened(Some(&file));
            return Ok((Ok(file),));
        }
        Err(error) => {
            guest.file_opened(None);
            error.downcast()?
        }
    };
    if matches!(code, ErrorCode::Access | ErrorCode::NotPermitted | ErrorCode::ReadOnly) {
        guest.denials.note(format_args!("opening {:?}", escaped(&name, NAME_BYTES_MAX)));
    }
    Ok((Err(code),))
}

/// The stream holds all names of the folder.
async fn read_directory(guest: &mut Guest, folder: Resource<Descriptor>) -> Opened<ReaddirIterator> {
    if !guest.may_list() {
        return Ok((Err(ErrorCode::Quota),));
    }
    match guest.filesystem().read_directory(folder).await {
        Ok(stream) => Ok((Ok(stream),)),
        Err(error) => {
            guest.listing_closed();
            Ok((Err(error.downcast()?),))
        }
    }
}

/// A stream holds its file open, so the file counts as open while the stream is there: it becomes its child.
fn stream_of<T: 'static>(
    guest: &mut Guest,
    file: Resource<Descriptor>,
    stream: Result<Resource<T>, wasmtime::Result<ErrorCode>>,
) -> Opened<T> {
    match stream {
        Ok(stream) => {
            guest.table.add_child(borrowed(&stream), file)?;
            Ok((Ok(stream),))
        }
        Err(code) => Ok((Err(code?),)),
    }
}
