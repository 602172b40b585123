//! How many instances there may be: of each plugin, and of all together.

use crate::config::{HostConfig, PluginConfig, PluginLimits};

/// Plugins of one broker: each has a bit in what a route knows of storage hooks.
pub(crate) const PLUGINS_MAX: usize = 64;
/// Plugins that may come into the folder while the broker runs and find room, beside those that are there at the start.
const NEWCOMERS: usize = 8;
/// Builds of one plugin that have instances at a time: the one that serves, one on trial or the one before it on
/// probation, and one that is being prepared.
const BUILDS: usize = 3;
/// Instances of one build for calls that no client waits for: `committed`, `events`, `cluster`.
const BACKGROUND: usize = 3;
/// Instances of all plugins. Each reserves 4 GiB of address space for each of two memories, and there are 128 TiB.
const INSTANCES_MAX: usize = 10_000;

/// Rooms of the pool: address space, which costs no memory until it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pool {
    /// Instances at a time; one more is refused.
    pub(crate) instances: u32,
    /// Bytes one linear memory may have.
    pub(crate) memory_bytes: usize,
}

/// What plugins with an entry in the configuration have of the pool, which is made once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    instances: usize,
    memory_bytes: usize,
    shards: usize,
}

impl Room {
    pub(crate) fn new(config: &HostConfig, pool: Pool) -> Self {
        let instances = config.plugins.iter().map(|plugin| share(&plugin.limits, config.shards)).sum();
        Self { instances, memory_bytes: pool.memory_bytes, shards: config.shards }
    }

    /// Limits that would need more room than there is stay as they are `now`.
    pub(crate) fn fit(&self, now: &[PluginConfig], wanted: &mut [PluginConfig]) {
        let mut instances: usize = wanted.iter().map(|plugin| share(&plugin.limits, self.shards)).sum();
        for PluginConfig { name, limits, .. } in wanted {
            let Some(old) = now.iter().find(|plugin| plugin.name == *name).map(|plugin| plugin.limits) else {
                continue;
            };
            if memory_bytes(limits.memory_mib) > self.memory_bytes {
                limits.memory_mib = old.memory_mib;
            }
            if limits.instances > old.instances && instances > self.instances {
                instances -= share(limits, self.shards) - share(&old, self.shards);
                limits.instances = old.instances;
            }
        }
    }
}

/// The address space that a memory reserves ends with the last of 4096 MiB.
fn memory_bytes(mib: u32) -> usize {
    (mib.min(4095) as usize) << 20
}

/// Instances that one plugin may have, all its builds together; others keep theirs whatever it does.
pub(crate) fn share(limits: &PluginLimits, shards: usize) -> usize {
    BUILDS * (shards.max(1) * limits.instances.max(1) + BACKGROUND)
}

/// Room for the share of each plugin; `None`: so many do not fit into the address space, each is to be allocated alone.
pub(crate) fn pool(config: &HostConfig, in_folder: usize) -> Option<Pool> {
    let folder = PluginLimits::default();
    let unnamed = match config.dir {
        Some(_) => (in_folder + NEWCOMERS).min(PLUGINS_MAX.saturating_sub(config.plugins.len())),
        None => 0,
    };
    let configured = config.plugins.iter().map(|plugin| plugin.limits);
    let limits = || configured.clone().chain(std::iter::repeat_n(folder, unnamed));
    let instances: usize = limits().map(|limits| share(&limits, config.shards)).sum();
    let memory_mib = limits().map(|limits| limits.memory_mib).max().unwrap_or(folder.memory_mib);
    let memory_bytes = memory_bytes(memory_mib);
    (instances <= INSTANCES_MAX).then_some(Pool { instances: instances.max(1) as u32, memory_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instances(shards: usize, plugins: usize, in_folder: Option<usize>) -> Option<usize> {
        let dir = in_folder.map(|_| "plugins".into());
        let plugins = vec![PluginConfig::default(); plugins];
        let config = HostConfig { dir, plugins, shards, ..HostConfig::default() };
        pool(&config, in_folder.unwrap_or(0)).map(|pool| pool.instances as usize)
    }

    #[test]
    fn each_plugin_has_room_for_a_replacement_on_every_shard() {
        let one = share(&PluginLimits::default(), 2);
        assert!(one > 2 * 2 * PluginLimits::default().instances, "{one}");
        assert_eq!(instances(2, 1, None), Some(one));
        assert_eq!(instances(2, 40, None), Some(40 * one));
        assert_eq!(instances(2, 0, Some(40)), Some(48 * one), "and for some that come later");
        assert_eq!(instances(2, 4, Some(100)), Some(64 * one), "there are no more plugins than that");
    }

    /// The pool is made once: what goes beyond it waits for a restart.
    #[test]
    fn limits_beyond_the_pool_stay_as_they_are() {
        let plugin = |name: &str, instances: usize, memory_mib: u32| {
            let limits = PluginLimits { memory_mib, instances, ..PluginLimits::default() };
            PluginConfig { name: name.into(), limits, ..PluginConfig::default() }
        };
        let now = vec![plugin("a", 4, 16), plugin("b", 4, 64)];
        let config = HostConfig { plugins: now.clone(), shards: 2, ..HostConfig::default() };
        let room = Room::new(&config, pool(&config, 0).expect("they fit"));
        let fit = |a: (usize, u32), b: (usize, u32)| {
            let mut wanted = vec![plugin("a", a.0, a.1), plugin("b", b.0, b.1)];
            room.fit(&now, &mut wanted);
            let limits = |plugin: &PluginConfig| (plugin.limits.instances, plugin.limits.memory_mib);
            (limits(&wanted[0]), limits(&wanted[1]))
        };
        assert_eq!(fit((4, 64), (2, 32)), ((4, 64), (2, 32)));
        assert_eq!(fit((4, 65), (4, 128)), ((4, 16), (4, 64)), "no memory is larger than the largest");
        assert_eq!(fit((5, 16), (4, 64)), ((4, 16), (4, 64)));
        assert_eq!(fit((6, 16), (2, 64)), ((6, 16), (2, 64)), "one makes room for the other");
        assert_eq!(fit((7, 16), (2, 64)), ((4, 16), (2, 64)));
    }

    #[test]
    fn many_shards_fit_and_beyond_that_there_is_no_pool() {
        assert_eq!(instances(64, 10, None), Some(10 * share(&PluginLimits::default(), 64)));
        assert_eq!(instances(1024, 10, None), None);
    }
}
