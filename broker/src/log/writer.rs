//! Lines of the log wait in a bounded buffer for a thread that writes them. Who logs never waits: when nobody reads
//! standard error the buffer fills, further lines are lost, and their number is logged once there is room again.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes of lines that wait to be written. Beyond that lines are lost, and counted.
pub(super) const LOG_BYTES_MAX: usize = 1 << 20;

pub(super) struct LogQueue {
    state: Mutex<State>,
    /// Something is to be written.
    filled: Condvar,
    /// Something has been written.
    written: Condvar,
    thread: OnceLock<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    /// Whole lines.
    waiting: Vec<u8>,
    /// Lines that found no room behind the waiting ones.
    lost: u64,
    /// The thread holds lines that it has not finished writing.
    writing: bool,
    /// Counts buffers that were written, so that a flush sees progress.
    rounds: u64,
}

impl LogQueue {
    /// Starts the thread. It writes to the file behind `to` directly: a lock of the standard library that it held while
    /// nobody reads would hold up everybody else who wants to print.
    pub(super) fn start(to: impl AsFd) -> io::Result<Arc<Self>> {
        let file = File::from(to.as_fd().try_clone_to_owned()?);
        let (state, filled, written) = (Mutex::default(), Condvar::new(), Condvar::new());
        let queue = Arc::new(Self { state, filled, written, thread: OnceLock::new() });
        let for_thread = Arc::clone(&queue);
        let thread = std::thread::Builder::new().name("log".into()).spawn(move || for_thread.run(file))?;
        let _ = queue.thread.set(thread);
        Ok(queue)
    }

    /// Nobody writes any more.
    pub(super) fn is_dead(&self) -> bool {
        self.thread.get().is_some_and(JoinHandle::is_finished)
    }

    fn run(&self, mut file: File) {
        let mut lines = Vec::new();
        loop {
            let lost = self.take(&mut lines);
            // An error leaves nowhere to report it.
            let _ = file.write_all(&lines);
            if lost > 0 {
                let _ = writeln!(file, "wasmqtt: {lost} lines of the log are lost here, nobody read standard error");
            }
            lines.clear();
            let mut state = self.lock();
            state.writing = false;
            state.rounds += 1;
            self.written.notify_all();
        }
    }

    /// Waits for lines, takes them, and says how many were lost after them.
    fn take(&self, lines: &mut Vec<u8>) -> u64 {
        let mut state = self.lock();
        while state.waiting.is_empty() {
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(lines, &mut state.waiting);
        state.writing = true;
        std::mem::take(&mut state.lost)
    }

    fn push(&self, line: &[u8]) {
        let mut state = self.lock();
        // Once a line is lost all are until there is room for the report, so the number stands where they are missing.
        if state.lost > 0 || state.waiting.len() + line.len() > LOG_BYTES_MAX {
            state.lost += 1;
            return;
        }
        state.waiting.extend_from_slice(line);
        self.filled.notify_one();
    }

    /// Waits until all that waits now is written; gives up when nothing at all could be written for `patience`.
    pub(super) fn flush(&self, patience: Duration) {
        let mut state = self.lock();
        let (mut rounds, mut until) = (state.rounds, Instant::now() + patience);
        while state.writing || !state.waiting.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            (state, _) = self.written.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            if state.rounds != rounds {
                (rounds, until) = (state.rounds, Instant::now() + patience);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes one line of the log, which is written at once and whole.
pub(super) struct QueuedLine(Arc<LogQueue>);

impl QueuedLine {
    pub(super) fn new(queue: &Arc<LogQueue>) -> Self {
        Self(Arc::clone(queue))
    }
}

impl Write for QueuedLine {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};

    use super::*;

    /// Lines of 1,000 bytes with their number in front.
    fn line(number: usize) -> Vec<u8> {
        format!("{number:<999}\n").into_bytes()
    }

    #[test]
    fn lines_that_nobody_reads_are_counted_and_hold_up_nobody() {
        let (reader, pipe) = io::pipe().expect("a pipe");
        let queue = LogQueue::start(&pipe).expect("a thread");
        drop(pipe);
        // A pipe holds 64 KiB, the thread one buffer, the queue another.
        let count = 3 * LOG_BYTES_MAX / 1_000;
        (0..count).for_each(|number| queue.push(&line(number)));
        queue.flush(Duration::from_millis(10));
        let mut reader = BufReader::new(reader).lines();
        // Lines may be lost in several places, when the thread comes between.
        let (mut next, mut lost) = (0, 0);
        while next < count {
            let text = reader.next().expect("more lines").expect("text");
            if let Some(report) = text.strip_prefix("wasmqtt: ") {
                let missing: usize = report.split(' ').next().and_then(|number| number.parse().ok()).expect("a number");
                (next, lost) = (next + missing, lost + missing);
            } else {
                assert_eq!(text.trim_end().parse(), Ok(next), "lines that are there are in order");
                next += 1;
            }
        }
        assert!(lost > 0 && lost < count && next == count, "{lost} of {count} are lost");
        queue.push(b"after\n");
        assert_eq!(reader.next().expect("one more").expect("text"), "after");
    }

    #[test]
    fn a_flush_waits_for_what_was_logged() {
        let (mut reader, pipe) = io::pipe().expect("a pipe");
        let queue = LogQueue::start(&pipe).expect("a thread");
        (0..50).for_each(|number| queue.push(&line(number)));
        queue.flush(Duration::from_mins(1));
        let mut written = vec![0; 50_000];
        io::Read::read_exact(&mut reader, &mut written).expect("everything is in the pipe");
        assert!(written.ends_with(b"\n"));
    }
}
