//! A disk that forgets and a disk that cannot be written: a library that the broker is started with, between it and the system.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Notes the size of each log file at its last sync in `SYNC_NOTES`; while the file `DISK_FAULT` exists, nothing can be
/// written to files of a store, with the error number in it.
const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
static int path_of(int fd, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, size - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return 1;
}
static void note(int fd) {
    char path[4096], line[4400];
    struct stat st;
    const char *notes = getenv("SYNC_NOTES");
    if (!notes || !path_of(fd, path, sizeof path) || fstat(fd, &st) != 0) return;
    size_t n = strlen(path);
    if (n < 4 || strcmp(path + n - 4, ".log") != 0) return;
    int length = snprintf(line, sizeof line, "%lld %s\n", (long long)st.st_size, path);
    int to = open(notes, O_WRONLY | O_CREAT | O_APPEND, 0600);
    ssize_t (*real)(int, const void *, size_t) = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    if (to >= 0) { if (real(to, line, length)) {} close(to); }
}
static int fault(int fd) {
    char path[4096];
    int number = 0;
    const char *flag = getenv("DISK_FAULT");
    FILE *file = flag ? fopen(flag, "r") : 0;
    if (!file) return 0;
    if (fscanf(file, "%d", &number) != 1) number = ENOSPC;
    fclose(file);
    return path_of(fd, path, sizeof path) && strstr(path, "/store/") ? number : 0;
}
int fsync(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    int rc = real(fd);
    if (rc == 0) note(fd);
    return rc;
}
int fdatasync(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    int rc = real(fd);
    if (rc == 0) note(fd);
    return rc;
}
ssize_t write(int fd, const void *bytes, size_t count) {
    ssize_t (*real)(int, const void *, size_t) = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    int number = fault(fd);
    if (number) { errno = number; return -1; }
    return real(fd, bytes, count);
}
"#;

/// Builds it in `folder`.
pub fn library(folder: &Path) -> PathBuf {
    let (source, library) = (folder.join("disk.c"), folder.join("disk.so"));
    std::fs::write(&source, SOURCE).expect("write");
    let mut command = Command::new("cc");
    command.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).arg("-ldl");
    assert!(command.status().expect("a C compiler").success());
    library
}

/// A power loss: what was written after the last sync is gone. Files of the log only; RocksDB uses others when they are
/// synced.
pub fn forget_unsynced(store: &Path, notes: &Path) {
    let noted = std::fs::read_to_string(notes).unwrap_or_default();
    for entry in std::fs::read_dir(store).expect("the store").flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "log") {
            continue;
        }
        let size_of = |line: &str| {
            let (size, file) = line.split_once(' ')?;
            (Path::new(file) == path).then(|| size.parse::<u64>().ok()).flatten()
        };
        let synced = noted.lines().rev().find_map(size_of).unwrap_or(0);
        let file = std::fs::OpenOptions::new().write(true).open(&path).expect("open");
        if file.metadata().expect("metadata").len() > synced {
            file.set_len(synced).expect("cut off");
        }
    }
}
