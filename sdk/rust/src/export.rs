//! From the functions that a component exports to the traits that an author implements. Not for direct use.

use std::cell::OnceCell;
use std::thread::LocalKey;

use crate::bindings::acl::exports::wasmqtt::plugin::acl;
use crate::bindings::auth::exports::wasmqtt::plugin::auth;
use crate::bindings::cluster::exports::wasmqtt::plugin::cluster;
use crate::bindings::events::exports::wasmqtt::plugin::events;
use crate::bindings::handover::exports::wasmqtt::plugin::handover;
use crate::bindings::imports::wasmqtt::plugin::types::{Client, Failure, Pair};
use crate::bindings::lifecycle::exports::wasmqtt::plugin::lifecycle;
use crate::bindings::storage_hook::exports::wasmqtt::plugin::storage_hook;
use crate::{Acl, Auth, Batch, Cluster, Events, Handover, Plugin, Settings, StorageHook};

/// What [`crate::export_plugin!`] exports.
pub struct Component<P>(std::marker::PhantomData<P>);

/// Where [`crate::export_plugin!`] keeps the plugin.
pub trait Instance: Plugin {
    /// One per instance: a component has one thread.
    fn cell() -> &'static LocalKey<OnceCell<Self>>;
}

fn with<P: Instance, R>(run: impl FnOnce(&P) -> Result<R, String>) -> Result<R, Failure> {
    with_failure(|plugin: &P| run(plugin).map_err(Failure::Unavailable))
}

fn with_failure<P: Instance, R>(run: impl FnOnce(&P) -> Result<R, Failure>) -> Result<R, Failure> {
    P::cell().with(|cell| {
        let plugin = cell.get().ok_or_else(|| Failure::Internal("init was not called".into()))?;
        run(plugin)
    })
}

impl<P: Instance> lifecycle::Guest for Component<P> {
    fn init(settings: Vec<Pair>) -> Result<lifecycle::Registration, Failure> {
        let settings = Settings(settings.into_iter().map(|pair| (pair.name, pair.value)).collect());
        let plugin = P::new(&settings).map_err(Failure::Internal)?;
        let wanted = plugin.registration();
        P::cell().with(|cell| cell.set(plugin)).map_err(|_| Failure::Internal("init was called twice".into()))?;
        Ok(lifecycle::Registration {
            filters: wanted.filters,
            before_store: wanted.before_store,
            at_rest: wanted.at_rest,
            committed: wanted.committed,
            payload: wanted.payload,
            events: wanted.events,
            extra: Vec::new(),
        })
    }

    fn health() -> Result<(), Failure> {
        with::<P, _>(P::health)
    }

    fn shutdown() {
        let _ = with::<P, _>(|plugin| {
            plugin.shutdown();
            Ok(())
        });
    }
}

impl<P: Instance + Auth> auth::Guest for Component<P> {
    fn authenticate(req: auth::Request) -> Result<auth::Outcome, Failure> {
        with::<P, _>(|plugin| plugin.authenticate(&req))
    }

    fn proceed(what: auth::Step) -> Result<auth::Outcome, Failure> {
        with::<P, _>(|plugin| plugin.proceed(&what))
    }
}

impl<P: Instance + Acl> acl::Guest for Component<P> {
    fn authorize(who: Client, what: Vec<acl::Access>) -> Result<Vec<acl::Decision>, Failure> {
        with::<P, _>(|plugin| what.iter().map(|access| plugin.authorize(&who, access)).collect())
    }
}

type WitChanges = Vec<(u32, storage_hook::Change)>;

impl<P: Instance + StorageHook> storage_hook::Guest for Component<P> {
    fn before_store(messages: storage_hook::Batch) -> Result<WitChanges, Failure> {
        with::<P, _>(|plugin| Ok(plugin.before_store(&Batch::new(messages))?.into_wit()))
    }

    fn after_load(messages: storage_hook::Batch) -> Result<WitChanges, Failure> {
        with::<P, _>(|plugin| Ok(plugin.after_load(&Batch::new(messages))?.into_wit()))
    }

    fn committed(messages: storage_hook::Batch) -> Result<(), Failure> {
        with_failure::<P, _>(|plugin| plugin.committed(&Batch::new(messages)))
    }
}

impl<P: Instance + Events> events::Guest for Component<P> {
    fn observed(events: Vec<events::Event>) {
        let _ = with::<P, _>(|plugin| {
            plugin.observed(&events);
            Ok(())
        });
    }
}

impl<P: Instance + Cluster> cluster::Guest for Component<P> {
    fn interest_changed(added: Vec<String>, removed: Vec<String>) -> Result<Vec<u8>, Failure> {
        with::<P, _>(|plugin| plugin.interest_changed(&added, &removed))
    }

    fn peer_interest(node: String, advert: Vec<u8>) -> Result<(), Failure> {
        with::<P, _>(|plugin| plugin.peer_interest(&node, &advert))
    }

    fn peer_changed(node: String, up: bool, labels: Vec<Pair>) {
        let _ = with::<P, _>(|plugin| {
            plugin.peer_changed(&node, up, &labels);
            Ok(())
        });
    }

    fn route_for(topics: Vec<String>) -> Result<Vec<cluster::LeasedRoute>, Failure> {
        with::<P, _>(|plugin| plugin.route_for(&topics))
    }

    fn on_frame(node: String, frame: Vec<u8>) {
        let _ = with::<P, _>(|plugin| {
            plugin.on_frame(&node, &frame);
            Ok(())
        });
    }
}

impl<P: Instance + Handover> handover::Guest for Component<P> {
    fn snapshot() -> Result<handover::State, Failure> {
        with::<P, _>(P::snapshot)
    }

    fn restore(old: handover::State) -> Result<(), Failure> {
        with::<P, _>(|plugin| plugin.restore(old))
    }
}
