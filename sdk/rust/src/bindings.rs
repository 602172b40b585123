//! What wit-bindgen generates from `wit/`: one module for each interface, so that a component exports only those that
//! its author chose. Not for direct use.

/// What every plugin can import, and the words that all interfaces share.
pub mod imports {
    wit_bindgen::generate!({ path: "../../wit", world: "imports", additional_derives: [Clone, PartialEq] });
}

pub mod lifecycle {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "has-lifecycle",
        pub_export_macro: true,
        export_macro_name: "export_lifecycle",
        additional_derives: [Clone, PartialEq],
        with: { "wasmqtt:plugin/types@0.1.0": crate::bindings::imports::wasmqtt::plugin::types },
    });
}

pub mod handover {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "has-handover",
        pub_export_macro: true,
        export_macro_name: "export_handover",
        additional_derives: [Clone, PartialEq],
        with: { "wasmqtt:plugin/types@0.1.0": crate::bindings::imports::wasmqtt::plugin::types },
    });
}

pub mod auth {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "has-auth",
        pub_export_macro: true,
        export_macro_name: "export_auth",
        additional_derives: [Clone, PartialEq],
        with: { "wasmqtt:plugin/types@0.1.0": crate::bindings::imports::wasmqtt::plugin::types },
    });
}

pub mod acl {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "has-acl",
        pub_export_macro: true,
        export_macro_name: "export_acl",
        additional_derives: [Clone, PartialEq],
        with: { "wasmqtt:plugin/types@0.1.0": crate::bindings::imports::wasmqtt::plugin::types },
    });
}

pub mod storage_hook {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "has-storage-hook",
        pub_export_macro: true,
        export_macro_name: "export_storage_hook",
        additional_derives: [Clone, PartialEq],
        with: { "wasmqtt:plugin/types@0.1.0": crate::bindings::imports::wasmqtt::plugin::types },
    });
}

pub mod cluster {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "has-cluster",
        pub_export_macro: true,
        export_macro_name: "export_cluster",
        additional_derives: [Clone, PartialEq],
        with: { "wasmqtt:plugin/types@0.1.0": crate::bindings::imports::wasmqtt::plugin::types },
    });
}

pub mod events {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "has-events",
        pub_export_macro: true,
        export_macro_name: "export_events",
        additional_derives: [Clone, PartialEq],
        with: { "wasmqtt:plugin/types@0.1.0": crate::bindings::imports::wasmqtt::plugin::types },
    });
}
