//! A disk that forgets and a disk that cannot be written: a library that the broker is started with, between it and the system.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Notes the size of each log file at its last sync in `SYNC_NOTES`, and there also each new name and each sync of a folder,
/// which makes the names in it last; while the file `DISK_FAULT` exists, nothing can be written to files of a store, with
/// the error number in it.
const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
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
static int real_open(const char *path, int flags, mode_t mode) {
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open");
    return real(path, flags, mode);
}
static void say(const char *line, int length) {
    const char *notes = getenv("SYNC_NOTES");
    int to = notes ? real_open(notes, O_WRONLY | O_CREAT | O_APPEND, 0600) : -1;
    ssize_t (*real)(int, const void *, size_t) = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    if (to >= 0) { if (real(to, line, length)) {} close(to); }
}
static void note(int fd) {
    char path[4096], line[4400];
    struct stat st;
    if (!getenv("SYNC_NOTES") || !path_of(fd, path, sizeof path) || fstat(fd, &st) != 0) return;
    size_t n = strlen(path);
    if (S_ISDIR(st.st_mode)) {
        say(line, snprintf(line, sizeof line, "dir %s\n", path));
    } else if (n >= 4 && strcmp(path + n - 4, ".log") == 0) {
        say(line, snprintf(line, sizeof line, "%lld %s\n", (long long)st.st_size, path));
    }
}
static void note_name(const char *path) {
    char whole[4200], line[4400];
    if (getenv("SYNC_NOTES") && realpath(path, whole)) say(line, snprintf(line, sizeof line, "new %s\n", whole));
}
static int is_there(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0;
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
static int open_noting(const char *name, const char *path, int flags, mode_t mode) {
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name);
    int is_new = (flags & O_CREAT) && !is_there(path);
    int fd = real(path, flags, mode);
    if (fd >= 0 && is_new) note_name(path);
    return fd;
}
int open(const char *path, int flags, ...) {
    va_list list; va_start(list, flags);
    mode_t mode = (flags & O_CREAT) ? va_arg(list, mode_t) : 0;
    va_end(list);
    return open_noting("open", path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list list; va_start(list, flags);
    mode_t mode = (flags & O_CREAT) ? va_arg(list, mode_t) : 0;
    va_end(list);
    return open_noting("open64", path, flags, mode);
}
int mkdir(const char *path, mode_t mode) {
    int (*real)(const char *, mode_t) = (int (*)(const char *, mode_t))dlsym(RTLD_NEXT, "mkdir");
    int rc = real(path, mode);
    if (rc == 0) note_name(path);
    return rc;
}
int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename");
    int rc = real(from, to);
    if (rc == 0) note_name(to);
    return rc;
}
int link(const char *from, const char *to) {
    int (*real)(const char *, const char *) = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "link");
    int rc = real(from, to);
    if (rc == 0) note_name(to);
    return rc;
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

/// Names that were given and did not last by then, in the order of the notes.
pub fn unsynced_names(notes: &Path) -> Vec<PathBuf> {
    let noted = std::fs::read_to_string(notes).unwrap_or_default();
    let mut names: Vec<PathBuf> = Vec::new();
    for line in noted.lines() {
        match line.split_once(' ') {
            Some(("new", path)) => names.push(path.into()),
            Some(("dir", folder)) => names.retain(|name| name.parent() != Some(Path::new(folder))),
            _ => {}
        }
    }
    names
}

/// A power loss on a file system where a name lasts only when its folder is synced: all others are gone, and what was
/// below them.
pub fn forget_names(notes: &Path) {
    for name in unsynced_names(notes) {
        if name.is_dir() {
            std::fs::remove_dir_all(&name).expect("delete");
        } else if name.symlink_metadata().is_ok() {
            std::fs::remove_file(&name).expect("delete");
        }
    }
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
