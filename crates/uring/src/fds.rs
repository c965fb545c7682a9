//! Answers for descriptors that nobody in this process owns: those that it was started with.

/// Has programs that are started from here on not get it. A number that is none changes nothing.
pub fn keep_to_ourselves(number: i32) {
    // SAFETY: the kernel sets a flag of the table of descriptors; no memory is passed to it, and
    // the flag changes nothing for whoever uses that number here.
    let _ = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    #[test]
    fn a_descriptor_is_kept_from_programs() {
        use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
        let (pipe, _other) = std::io::pipe().unwrap();
        fcntl_setfd(&pipe, FdFlags::empty()).unwrap();
        super::keep_to_ourselves(pipe.as_raw_fd());
        assert_eq!(fcntl_getfd(&pipe).unwrap(), FdFlags::CLOEXEC);
        super::keep_to_ourselves(-1);
    }
}
