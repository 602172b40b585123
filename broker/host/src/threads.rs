//! Threads of the host that the broker cannot do without.

use std::sync::Arc;

/// Called with the name of a thread that has panicked. What it looked after is not looked after any more, so a broker
/// should end.
pub type ThreadDied = Arc<dyn Fn(&str) + Send + Sync>;

/// Kept by a thread while it runs.
pub(crate) struct Watched {
    name: &'static str,
    died: Option<ThreadDied>,
}

impl Watched {
    pub(crate) fn new(name: &'static str, died: Option<&ThreadDied>) -> Self {
        Self { name, died: died.cloned() }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(died) = &self.died
        {
            died(self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_thread_that_panics_is_reported_and_one_that_ends_is_not() {
        let dead: Arc<Mutex<Vec<String>>> = Arc::default();
        let noted = Arc::clone(&dead);
        let died: ThreadDied = Arc::new(move |name| noted.lock().expect("not poisoned").push(name.to_owned()));
        let (good, bad) = (Watched::new("good", Some(&died)), Watched::new("bad", Some(&died)));
        std::thread::spawn(move || drop(good)).join().expect("ends well");
        let panics = std::thread::spawn(move || {
            let _bad = bad;
            panic!("as told");
        });
        assert!(panics.join().is_err());
        assert_eq!(*dead.lock().expect("not poisoned"), ["bad"]);
    }
}
