//! Bytes on their way to one client: small packets copied together, large payloads shared.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::Bytes;

/// Payloads from this size on are shared instead of copied: below it a copy is cheaper than an iovec.
pub(crate) const SHARED_PAYLOAD_BYTES_MIN: usize = 16 * 1024;
/// Written bytes at the front of a buffer from which on it is worth to move what follows them.
const COMPACT_BYTES_MIN: usize = 16 * 1024;
/// A buffer with at least this capacity is given back when little of it is in use.
const SHRINK_BYTES_MIN: usize = 64 * 1024;

#[derive(Debug)]
enum Chunk {
    Inline(Vec<u8>),
    Shared(Bytes),
}

impl Chunk {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Inline(bytes) => bytes,
            Self::Shared(bytes) => bytes,
        }
    }
}

/// What is to be written to a client, in order. Its owner bounds it by looking at [`Outbox::len`].
///
/// Memory follows what is not yet written: [`Outbox::capacity`] stays below four times the largest `len` since the
/// outbox was last empty, and is at most twice `len` plus 80 KiB once a client that had fallen behind catches up.
#[derive(Debug, Default)]
pub struct Outbox {
    chunks: VecDeque<Chunk>,
    tail: Vec<u8>,
    /// Bytes of the first chunk (or of the tail, when there is no chunk) that are already written.
    written: usize,
    len: usize,
}

impl Outbox {
    /// Bytes not yet written.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of memory that this outbox holds, payloads shared with others included.
    pub fn capacity(&self) -> usize {
        let chunk = |chunk: &Chunk| match chunk {
            Chunk::Inline(bytes) => bytes.capacity(),
            Chunk::Shared(bytes) => bytes.len(),
        };
        self.chunks.iter().map(chunk).sum::<usize>() + self.tail.capacity()
    }

    /// Lets `write` append to the end.
    pub fn append(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let before = self.tail.len();
        write(&mut self.tail);
        self.len += self.tail.len() - before;
    }

    /// Copies `bytes` to the end.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        self.len += bytes.len();
    }

    /// Appends without a copy.
    pub fn push_shared(&mut self, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        self.len += bytes.len();
        if !self.tail.is_empty() {
            self.chunks.push_back(Chunk::Inline(std::mem::take(&mut self.tail)));
        }
        self.chunks.push_back(Chunk::Shared(bytes));
    }

    /// The one slice that holds everything, if there is just one.
    pub fn single(&self) -> Option<&[u8]> {
        self.chunks.is_empty().then(|| &self.tail[self.written..])
    }

    /// The first slices to write, at most as many as `slices` has room for.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut skip = self.written;
        let parts = self.chunks.iter().map(Chunk::bytes).chain(std::iter::once(&self.tail[..]));
        let mut count = 0;
        for (slot, part) in slices.iter_mut().zip(parts) {
            *slot = IoSlice::new(&part[skip..]);
            skip = 0;
            count += 1;
        }
        count
    }

    /// Forgets the first `count` bytes, which were written.
    pub fn consume(&mut self, mut count: usize) {
        debug_assert!(count <= self.len);
        self.len -= count;
        while let Some(first) = self.chunks.front() {
            let left = first.bytes().len() - self.written;
            if count < left {
                self.written += count;
                return;
            }
            count -= left;
            self.written = 0;
            self.chunks.pop_front();
        }
        self.written += count;
        if self.written == self.tail.len() {
            self.tail.clear();
            self.written = 0;
        } else if self.written >= COMPACT_BYTES_MIN && self.written >= self.tail.len() / 2 {
            self.compact();
        }
    }

    /// Forgets the written front of the tail. A client that reads slower than messages come never empties its outbox,
    /// so this must not wait until it is empty. At most as many bytes are moved as were written since the last time.
    #[cold]
    fn compact(&mut self) {
        let left = self.tail.len() - self.written;
        if self.tail.capacity() >= SHRINK_BYTES_MIN && left < self.tail.capacity() / 4 {
            let mut tail = Vec::with_capacity(left * 2);
            tail.extend_from_slice(&self.tail[self.written..]);
            self.tail = tail;
        } else {
            self.tail.drain(..self.written);
        }
        self.written = 0;
    }

    /// Gives an empty buffer's memory away, so that an idle connection owns none.
    pub fn release(&mut self) -> Vec<u8> {
        debug_assert!(self.is_empty());
        self.chunks = VecDeque::new();
        std::mem::take(&mut self.tail)
    }

    /// Takes a buffer from a pool when this outbox has none.
    pub fn lend(&mut self, pool: &mut Vec<Vec<u8>>) {
        if self.tail.capacity() == 0
            && let Some(buffer) = pool.pop()
        {
            self.tail = buffer;
        }
    }

    /// Everything that is left, joined; for tests and for moving a connection.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all: Vec<u8> = Vec::with_capacity(self.len);
        for chunk in &self.chunks {
            all.extend_from_slice(chunk.bytes());
        }
        all.extend_from_slice(&self.tail);
        all.drain(..self.written);
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is appended and however it is written: the bytes come out once and in order, and memory stays near
        /// what is not yet written, although the outbox may never become empty.
        #[test]
        fn memory_follows_what_is_unwritten(
            turns in proptest::collection::vec((1_usize..40_000, any::<bool>(), 0_usize..60_000), 1..200),
        ) {
            const LEN_MAX: usize = 256 * 1024;
            let mut outbox = Outbox::default();
            let (mut next, mut expected) = (0_u8, 0_u8);
            for (bytes, shared, written) in turns {
                if outbox.len() < LEN_MAX {
                    let block: Vec<u8> = std::iter::repeat_with(|| { next = next.wrapping_add(1); next.wrapping_sub(1) })
                        .take(bytes).collect();
                    if shared { outbox.push_shared(block.into()) } else { outbox.extend(&block) }
                }
                let mut slices = [IoSlice::new(&[]); 8];
                let count = outbox.slices(&mut slices);
                let flat: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.iter().copied()).take(written).collect();
                for byte in &flat {
                    prop_assert_eq!(*byte, expected);
                    expected = expected.wrapping_add(1);
                }
                outbox.consume(flat.len());
                prop_assert!(outbox.capacity() <= 4 * (LEN_MAX + 40_000), "{} for {}", outbox.capacity(), outbox.len());
            }
        }
    }

    /// A client that always leaves something unwritten: what was written does not stay in memory.
    #[test]
    fn a_reader_that_never_catches_up_holds_no_written_bytes() {
        let mut outbox = Outbox::default();
        outbox.extend(&vec![0; 100_000]);
        for _ in 0..10_000 {
            outbox.extend(&[0; 10_000]);
            outbox.consume(10_000);
            assert!(outbox.capacity() <= 4 * 110_000, "{} bytes for {}", outbox.capacity(), outbox.len());
        }
        outbox.consume(99_000);
        assert!(outbox.capacity() <= 2 * outbox.len() + 80 * 1024, "{} bytes are left of a burst", outbox.capacity());
    }

    #[test]
    fn partial_writes_across_chunks_keep_the_order() {
        let mut outbox = Outbox::default();
        outbox.extend(b"abc");
        outbox.push_shared(Bytes::from_static(b"defg"));
        outbox.extend(b"hi");
        for step in 1..9 {
            let mut copy = Vec::new();
            let mut other = Outbox::default();
            other.extend(&outbox.to_vec()[..3]);
            other.push_shared(Bytes::from_static(b"defg"));
            other.extend(b"hi");
            while !other.is_empty() {
                let mut slices = [IoSlice::new(&[]); 2];
                let count = other.slices(&mut slices);
                let flat: Vec<u8> = slices[..count].iter().flat_map(|s| s.iter().copied()).collect();
                let take = step.min(flat.len());
                copy.extend_from_slice(&flat[..take]);
                other.consume(take);
            }
            assert_eq!(copy, b"abcdefghi");
        }
    }
}
