//! What a plugin keeps beside its instances and builds, over `wasi:keyvalue`. The operator says how much that may be:
//! `grants = { keyvalue_mib = 16 }`.
//!
//! All instances see the same buckets, and each function is atomic. In native tests buckets are those of the thread.

/// Values under names.
#[derive(Debug)]
pub struct Bucket(imp::Bucket);

impl Bucket {
    /// Opens one of the plugin's own; it is there as soon as something is in it.
    ///
    /// # Errors
    /// Not granted.
    pub fn open(name: &str) -> Result<Self, String> {
        imp::Bucket::open(name).map(Self)
    }

    /// The value of a key.
    ///
    /// # Errors
    /// The host's.
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>, String> {
        self.0.get(key)
    }

    /// Sets the value of a key.
    ///
    /// # Errors
    /// There is no room for it, or the key has more than 1,024 bytes.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), String> {
        self.0.set(key, value)
    }

    /// Removes a key, if it is there.
    ///
    /// # Errors
    /// The host's.
    pub fn delete(&self, key: &str) -> Result<(), String> {
        self.0.delete(key)
    }

    /// Adds to a number, which begins at 0, and returns what it is then. It is kept as eight bytes, the lowest first.
    ///
    /// # Errors
    /// The value is no number, or becomes too large; there is no room for it.
    pub fn increment(&self, key: &str, delta: u64) -> Result<u64, String> {
        self.0.increment(key, delta)
    }

    /// All keys, in order.
    ///
    /// # Errors
    /// The host's.
    pub fn keys(&self) -> Result<Vec<String>, String> {
        self.0.keys()
    }
}

#[cfg(target_arch = "wasm32")]
mod imp {
    use bindings::wasi::keyvalue::{atomics, store};

    #[allow(unsafe_code, missing_docs, unreachable_pub, clippy::pedantic, reason = "generated")]
    mod bindings {
        wit_bindgen::generate!({ path: "../../wit/deps/keyvalue", world: "imports" });
    }

    #[derive(Debug)]
    pub(super) struct Bucket(store::Bucket);

    fn text(from: store::Error) -> String {
        match from {
            store::Error::NoSuchStore => "no such bucket".into(),
            store::Error::AccessDenied => "not granted: the plugin's entry needs grants = { keyvalue_mib = N }".into(),
            store::Error::Other(text) => text,
        }
    }

    impl Bucket {
        pub(super) fn open(name: &str) -> Result<Self, String> {
            store::open(name).map(Self).map_err(text)
        }

        pub(super) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, String> {
            self.0.get(key).map_err(text)
        }

        pub(super) fn set(&self, key: &str, value: &[u8]) -> Result<(), String> {
            self.0.set(key, value).map_err(text)
        }

        pub(super) fn delete(&self, key: &str) -> Result<(), String> {
            self.0.delete(key).map_err(text)
        }

        pub(super) fn increment(&self, key: &str, delta: u64) -> Result<u64, String> {
            atomics::increment(&self.0, key, delta).map_err(text)
        }

        pub(super) fn keys(&self) -> Result<Vec<String>, String> {
            let mut keys = Vec::new();
            let mut cursor = None;
            loop {
                let page = self.0.list_keys(cursor).map_err(text)?;
                keys.extend(page.keys);
                cursor = page.cursor;
                if cursor.is_none() {
                    return Ok(keys);
                }
            }
        }
    }
}

#[cfg(not(target_arch = "wasm32"))]
mod imp {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    thread_local! {
        static BUCKETS: RefCell<BTreeMap<(String, String), Vec<u8>>> = RefCell::default();
    }

    #[derive(Debug)]
    pub(super) struct Bucket(String);

    #[allow(clippy::unnecessary_wraps, reason = "as in a component")]
    impl Bucket {
        fn place(&self, key: &str) -> (String, String) {
            (self.0.clone(), key.to_owned())
        }

        pub(super) fn open(name: &str) -> Result<Self, String> {
            Ok(Self(name.to_owned()))
        }

        pub(super) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, String> {
            Ok(BUCKETS.with_borrow(|buckets| buckets.get(&self.place(key)).cloned()))
        }

        pub(super) fn set(&self, key: &str, value: &[u8]) -> Result<(), String> {
            BUCKETS.with_borrow_mut(|buckets| buckets.insert(self.place(key), value.to_vec()));
            Ok(())
        }

        pub(super) fn delete(&self, key: &str) -> Result<(), String> {
            BUCKETS.with_borrow_mut(|buckets| buckets.remove(&self.place(key)));
            Ok(())
        }

        pub(super) fn increment(&self, key: &str, delta: u64) -> Result<u64, String> {
            let old = match self.get(key)? {
                None => 0,
                Some(value) => u64::from_le_bytes(value.try_into().map_err(|_| format!("{key:?} is no number"))?),
            };
            let new = old.checked_add(delta).ok_or_else(|| format!("{key:?} would be too large"))?;
            self.set(key, &new.to_le_bytes())?;
            Ok(new)
        }

        pub(super) fn keys(&self) -> Result<Vec<String>, String> {
            let of_this = |(bucket, key): &(String, String)| (*bucket == self.0).then(|| key.clone());
            Ok(BUCKETS.with_borrow(|buckets| buckets.keys().filter_map(of_this).collect()))
        }
    }

    #[cfg(test)]
    mod tests {
        use super::super::Bucket;

        #[test]
        fn buckets_keep_what_is_put_in() {
            let (one, other) = (Bucket::open("one").unwrap(), Bucket::open("other").unwrap());
            one.set("k", b"v").unwrap();
            assert_eq!((one.get("k"), other.get("k")), (Ok(Some(b"v".to_vec())), Ok(None)));
            assert_eq!((one.increment("n", 2), one.increment("n", 3)), (Ok(2), Ok(5)));
            assert!(one.increment("k", 1).is_err());
            assert_eq!(one.keys(), Ok(vec!["k".to_owned(), "n".to_owned()]));
            one.delete("k").unwrap();
            assert_eq!(one.get("k"), Ok(None));
        }
    }
}
