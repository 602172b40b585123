//! The memory budget of the whole broker, and how near to it the broker is.
//!
//! Every queue, buffer and cache has a bound of its own; this is for their sum. What counts is the resident memory of
//! the process without files that are mapped into it, so whatever takes it (messages, plugins, the store's tables) is
//! seen. Shards and the acceptor look at [`Budget::pressure`]; whoever comes by first after [`LOOK_INTERVAL_MS`]
//! measures, so that an idle broker does nothing.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use tracing::{info, warn};

/// Time between two measurements, which cost some microseconds each.
const LOOK_INTERVAL_MS: u64 = 10;
/// Parts of the budget, in percent: where pressure begins, where nothing more is taken in, and where both end.
const HIGH_PERCENT: u64 = 90;
const FULL_PERCENT: u64 = 97;
const CALM_PERCENT: u64 = 85;
/// Log lines about a budget that is reached again and again are this far apart.
const LOG_INTERVAL_MS: u64 = 60_000;

/// How near the broker is to its budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Pressure {
    /// All is well.
    None,
    /// New connections wait, and publishers are slowed down.
    High,
    /// What would have to be held in memory is refused, too.
    Full,
}

/// The budget and what was measured last.
pub(crate) struct Budget {
    bytes_max: AtomicU64,
    measure: Option<File>,
    level: AtomicU8,
    looked_at_ms: AtomicU64,
    logged_at_ms: AtomicU64,
}

impl Budget {
    /// `bytes_max`: `None` takes three quarters of the memory that the machine or the control group of this process
    /// has. Where resident memory cannot be measured there is no budget.
    pub(crate) fn new(bytes_max: Option<usize>) -> Self {
        let budget = Self {
            bytes_max: AtomicU64::new(u64::MAX),
            measure: File::open("/proc/self/status").ok(),
            level: AtomicU8::new(0),
            looked_at_ms: AtomicU64::new(0),
            logged_at_ms: AtomicU64::new(0),
        };
        budget.limit(bytes_max);
        budget
    }

    /// Another budget, as for [`Budget::new`]; counts from the next measurement on.
    pub(crate) fn limit(&self, bytes_max: Option<usize>) {
        let three_quarters = || available().map_or(u64::MAX, |bytes| bytes / 4 * 3);
        self.bytes_max.store(bytes_max.map_or_else(three_quarters, |max| max as u64), Ordering::Relaxed);
    }

    /// As measured last.
    #[inline]
    pub(crate) fn pressure(&self) -> Pressure {
        match self.level.load(Ordering::Relaxed) {
            0 => Pressure::None,
            1 => Pressure::High,
            _ => Pressure::Full,
        }
    }

    /// Measures, if that was not done for a while.
    #[inline]
    pub(crate) fn look(&self, now_ms: u64) -> Pressure {
        let last = self.looked_at_ms.load(Ordering::Relaxed);
        if now_ms >= last + LOOK_INTERVAL_MS
            && self.looked_at_ms.compare_exchange(last, now_ms, Ordering::Relaxed, Ordering::Relaxed).is_ok()
            && let Some(used) = self.used()
        {
            self.judge(now_ms, used);
        }
        self.pressure()
    }

    /// Has it stay like this.
    #[cfg(test)]
    pub(crate) fn freeze(&self, level: Pressure) {
        self.level.store(level as u8, Ordering::Relaxed);
        self.looked_at_ms.store(u64::MAX / 2, Ordering::Relaxed);
    }

    fn used(&self) -> Option<u64> {
        let mut text = [0; 4096];
        let count = self.measure.as_ref()?.read_at(&mut text, 0).ok()?;
        // The name of the process comes first and may be anything.
        kibibytes(&String::from_utf8_lossy(&text[..count]), "RssAnon:")
    }

    fn judge(&self, now_ms: u64, used: u64) {
        let before = self.pressure();
        let percent = used.saturating_mul(100) / self.bytes_max.load(Ordering::Relaxed).max(1);
        let after = match (percent, before) {
            (FULL_PERCENT.., _) => Pressure::Full,
            (HIGH_PERCENT.., _) | (CALM_PERCENT.., Pressure::High | Pressure::Full) => Pressure::High,
            _ => Pressure::None,
        };
        if after == before {
            return;
        }
        self.level.store(after as u8, Ordering::Relaxed);
        self.log(now_ms, used, before, after);
    }

    /// Once for each time that the budget is neared, and seldom if that is often.
    fn log(&self, now_ms: u64, used: u64, before: Pressure, after: Pressure) {
        let (used_mib, memory_mib) = (used >> 20, self.bytes_max.load(Ordering::Relaxed) >> 20);
        let last = self.logged_at_ms.load(Ordering::Relaxed);
        match (before, after) {
            (Pressure::None, _) if last == 0 || now_ms >= last + LOG_INTERVAL_MS => {
                self.logged_at_ms.store(now_ms, Ordering::Relaxed);
                warn!(
                    used_mib,
                    memory_mib,
                    "memory is nearly used up: new connections wait and publishers are slowed down until there is room; \
                     [limits] memory_mib is the budget"
                );
            }
            (_, Pressure::None) if now_ms < last + LOG_INTERVAL_MS => {
                info!(used_mib, memory_mib, "there is memory again");
            }
            _ => {}
        }
    }
}

/// Memory of the machine, or of the control group if that has less.
fn available() -> Option<u64> {
    let machine = kibibytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")?;
    let group = std::fs::read_to_string("/proc/self/cgroup").ok().and_then(|groups| group_limit(&groups));
    Some(group.map_or(machine, |group| group.min(machine)))
}

/// Has the allocator give back to the system what other threads have freed of this one's memory: allocators with heaps of
/// their own for each thread, such as mimalloc, look at that when the thread asks for a large block.
pub(crate) fn collect() {
    const LARGE_BYTES: usize = 1 << 20;
    drop(std::hint::black_box(Vec::<u8>::with_capacity(LARGE_BYTES)));
}

/// Bytes of a line such as `MemTotal:  16336172 kB`.
fn kibibytes(lines: &str, name: &str) -> Option<u64> {
    let line = lines.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.split_ascii_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// The smallest limit on the way from the group of this process to the root (version 2 of control groups, whose line in
/// `/proc/self/cgroup` begins with `0::`), or that of version 1.
fn group_limit(groups: &str) -> Option<u64> {
    let limit = |path: &Path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let unified = groups.lines().find_map(|line| line.strip_prefix("0::"));
    let mut found = limit(Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
    let path = Path::new("/sys/fs/cgroup").join(unified.unwrap_or("").trim_start_matches('/'));
    for folder in path.ancestors().take_while(|folder| folder.starts_with("/sys/fs/cgroup")) {
        let here = limit(&folder.join("memory.max"));
        found = [found, here].into_iter().flatten().min();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget() -> Budget {
        Budget::new(Some(1000))
    }

    fn judged(budget: &Budget, used: u64) -> Pressure {
        budget.judge(1, used);
        budget.pressure()
    }

    /// Pressure ends well below where it began, so that it does not come and go with every message.
    #[test]
    fn pressure_has_steps_and_ends_below_where_it_began() {
        let budget = budget();
        let steps = [
            (899, Pressure::None),
            (900, Pressure::High),
            (970, Pressure::Full),
            (2000, Pressure::Full),
            (960, Pressure::High),
            (850, Pressure::High),
            (849, Pressure::None),
            (899, Pressure::None),
        ];
        for (used, wanted) in steps {
            assert_eq!(judged(&budget, used), wanted, "{used} of 1000 bytes");
        }
    }

    #[test]
    fn what_the_system_says_is_understood() {
        let lines = "MemTotal:       16336172 kB\nRssAnon:\t   12 kB\n";
        assert_eq!(kibibytes(lines, "MemTotal:"), Some(16_336_172 << 10));
        assert_eq!(kibibytes(lines, "RssAnon:"), Some(12 << 10));
        assert_eq!(kibibytes(lines, "VmRSS:"), None);
    }

    /// What this process takes is measured, and again only after a while.
    #[test]
    fn memory_of_this_process_is_measured() {
        let budget = Budget::new(Some(1));
        assert_eq!(budget.look(LOOK_INTERVAL_MS), Pressure::Full);
        let roomy = Budget::new(None);
        assert_eq!(roomy.look(LOOK_INTERVAL_MS), Pressure::None, "of {:?} bytes", roomy.bytes_max);
        assert!(roomy.used() > Some(100_000));
    }
}
