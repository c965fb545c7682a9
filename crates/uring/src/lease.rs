//! Answers for whether anybody else has a file open, be it a program or the kernel itself for a
//! loop device: one question, however many of these there are.

use std::os::fd::{AsRawFd, BorrowedFd};

/// `F_SETSIG` (include/uapi/asm-generic/fcntl.h).
const F_SETSIG: libc::c_int = 10;

/// Whether `file` is open by this descriptor alone. `false` where that cannot be said: the file
/// system has no leases, or the file is another user's and this process may not have one.
///
/// The kernel lends a write lease only on a file that nobody else has open (fs/locks.c,
/// `check_conflicting_open`, by counts of the inode). It is given back at once. Who opens the file
/// in between waits for that, and this process gets a signal that it ignores: SIGURG instead of
/// SIGIO, which would end it.
#[must_use]
pub fn is_open_here_alone(file: BorrowedFd<'_>) -> bool {
    let call = |command: libc::c_int, word: libc::c_int| {
        // SAFETY: these commands take a number each and touch no memory of ours; `file` is open.
        unsafe { libc::fcntl(file.as_raw_fd(), command, word) == 0 }
    };
    let is_alone =
        call(F_SETSIG, libc::SIGURG) && call(libc::F_SETLEASE, libc::c_int::from(libc::F_WRLCK));
    if is_alone {
        call(libc::F_SETLEASE, libc::c_int::from(libc::F_UNLCK));
    }
    is_alone
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::is_open_here_alone;

    #[test]
    fn whoever_else_has_a_file_open_is_seen_and_the_lease_does_not_stay() {
        let path = std::env::temp_dir().join(format!("devsplice-lease-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        for _ in 0..2 {
            assert!(is_open_here_alone(file.as_fd()));
        }
        for write in [false, true] {
            let other = File::options().read(true).write(write).open(&path).unwrap();
            assert!(!is_open_here_alone(file.as_fd()), "write: {write}");
            drop(other);
        }
        assert!(is_open_here_alone(file.as_fd()));
        // Whoever opens it now does not have to wait.
        let leases = std::fs::read_to_string("/proc/locks").unwrap();
        let inode = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
        let of_it = |line: &&str| line.contains("LEASE") && line.contains(&format!(":{inode} "));
        assert_eq!(leases.lines().find(of_it), None);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_has_no_leases_counts_as_open_elsewhere() {
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        assert!(!is_open_here_alone(null.as_fd()));
        let (pipe, _other) = std::io::pipe().unwrap();
        assert!(!is_open_here_alone(pipe.as_fd()));
    }
}
