//! What a component exports of what this broker calls: every interface is optional.

use wasmtime::Store;
use wasmtime::component::{Instance, InstancePre};

use crate::bindings::{acl, auth, cluster, events, handover, lifecycle, storage_hook};
use crate::diagnosis;
use crate::guest::Guest;
use crate::instance::one_line;

macro_rules! exports {
    ($($field:ident: $module:ident $indices:ident $bound:ident $name:literal,)+) => {
        /// Where the functions of a component are, found once per build.
        pub(crate) struct Indices {
            $(pub(crate) $field: Option<$module::$indices>,)+
        }

        /// The functions of one instance.
        pub(crate) struct Exports {
            $(pub(crate) $field: Option<$module::$bound>,)+
        }

        impl Indices {
            pub(crate) fn find(pre: &InstancePre<Guest>) -> Self {
                Self { $($field: $module::$indices::new(pre).ok(),)+ }
            }

            /// An error says which function is not as this broker knows it.
            pub(crate) fn load(&self, store: &mut Store<Guest>, instance: &Instance) -> Result<Exports, String> {
                Ok(Exports {
                    $($field: match &self.$field {
                        None => None,
                        Some(indices) => match indices.load(&mut *store, instance) {
                            Ok(exports) => Some(exports),
                            Err(error) => {
                                return Err(diagnosis::misfit(store, instance, $name, &one_line(&error)));
                            }
                        },
                    },)+
                })
            }

            /// Names of those that are there.
            pub(crate) fn names(&self) -> Vec<&'static str> {
                [$(self.$field.is_some().then_some($name),)+].into_iter().flatten().collect()
            }
        }
    };
}
exports! {
    lifecycle: lifecycle HasLifecycleIndices HasLifecycle "lifecycle",
    handover: handover HasHandoverIndices HasHandover "handover",
    auth: auth HasAuthIndices HasAuth "auth",
    acl: acl HasAclIndices HasAcl "acl",
    storage_hook: storage_hook HasStorageHookIndices HasStorageHook "storage-hook",
    cluster: cluster HasClusterIndices HasCluster "cluster",
    events: events HasEventsIndices HasEvents "events",
}

impl Indices {
    /// There is something to call it for.
    pub(crate) fn has_plug_point(&self) -> bool {
        self.names().iter().any(|name| !matches!(*name, "lifecycle" | "handover"))
    }
}
