//! A clock of the system that jumps: a library that the broker is started with, between it and the system.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Adds the seconds in the file `CLOCK_SHIFT` to the time of day, and to nothing else.
const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long long shift(void) {
    long long seconds = 0;
    const char *path = getenv("CLOCK_SHIFT");
    FILE *file = path ? fopen(path, "r") : 0;
    if (!file) return 0;
    if (fscanf(file, "%lld", &seconds) != 1) seconds = 0;
    fclose(file);
    return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    int (*real)(clockid_t, struct timespec *) = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int rc = real(clock, at);
    if (rc == 0 && clock == CLOCK_REALTIME) at->tv_sec += shift();
    return rc;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &now) != 0) return -1;
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"#;

/// The library, and the file with the shift.
#[derive(Debug)]
pub struct Clock {
    library: PathBuf,
    shift: PathBuf,
}

impl Clock {
    /// Builds it in `folder`; the clock is right.
    pub fn new(folder: &Path) -> Self {
        let (source, library) = (folder.join("clock.c"), folder.join("clock.so"));
        std::fs::write(&source, SOURCE).expect("write");
        let mut command = Command::new("cc");
        command.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).arg("-ldl");
        assert!(command.status().expect("a C compiler").success());
        Self { library, shift: folder.join("shift") }
    }

    /// For the broker.
    pub fn environment(&self) -> [(&str, &Path); 2] {
        [("LD_PRELOAD", &self.library), ("CLOCK_SHIFT", &self.shift)]
    }

    /// The clock is so many seconds ahead from now on.
    pub fn set(&self, seconds: i64) {
        // As a whole or not at all.
        let new = self.shift.with_extension("new");
        std::fs::write(&new, seconds.to_string()).expect("write");
        std::fs::rename(&new, &self.shift).expect("rename");
    }
}
