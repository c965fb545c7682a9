//! Answers for the demo's fio run: writes over the whole disk, then reads back and compares.

use serde_json::Value;

use super::tool::{SLOW, Tool};
use crate::Fallible;

/// Requests that each job keeps in flight.
pub const DEPTH: u32 = 16;
/// Where the jobs begin: in either half of the disk.
const JOBS: &[(&str, &str)] = &[("first-half", "0"), ("second-half", "256m")];
/// Bytes that each job writes.
const SIZE: u64 = 64 << 20;

/// Runs fio on `device`; how many bytes were written, read back and compared.
pub fn verify(device: &str) -> Fallible<u64> {
    let mut fio = Tool::new("fio", SLOW)
        .args(["--name=global", "--ioengine=libaio", "--direct=1", "--rw=randwrite"])
        .args(["--bsrange=4k-256k", "--verify=crc32c", "--verify_fatal=1"])
        .args(["--verify_state_save=0", "--output-format=json"])
        .arg(format!("--iodepth={DEPTH}"))
        .arg(format!("--size={SIZE}"))
        .arg(format!("--filename={device}"));
    for (name, offset) in JOBS {
        fio = fio.arg(format!("--name={name}")).arg(format!("--offset={offset}"));
    }
    let text = fio.run()?;
    let bytes = verified(&text).ok_or_else(|| {
        format!("fio's report shows errors, or less verified than written: {text}")
    })?;
    let wanted = SIZE * JOBS.len() as u64;
    match bytes == wanted {
        true => Ok(bytes),
        false => Err(format!("fio verified {bytes} bytes of {wanted}")),
    }
}

/// The bytes that a report without errors shows as written and read back.
fn verified(text: &str) -> Option<u64> {
    // Remarks may come before the report.
    let report: Value = serde_json::from_str(&text[text.find('{')?..]).ok()?;
    let mut bytes = 0;
    for job in report["jobs"].as_array()? {
        let (written, read) =
            (job["write"]["io_bytes"].as_u64()?, job["read"]["io_bytes"].as_u64()?);
        if job["error"].as_i64()? != 0 || written != read {
            return None;
        }
        bytes += written;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_and_read_back_without_error_counts() {
        let job = |error: i64, read: u64| {
            format!(r#"{{"error":{error},"write":{{"io_bytes":8}},"read":{{"io_bytes":{read}}}}}"#)
        };
        let report = |jobs: &[String]| format!("fio: a remark\n{{\"jobs\":[{}]}}", jobs.join(","));
        assert_eq!(verified(&report(&[job(0, 8), job(0, 8)])), Some(16));
        assert_eq!(verified(&report(&[job(0, 8), job(0, 4)])), None);
        assert_eq!(verified(&report(&[job(5, 8)])), None);
        assert_eq!(verified("no report"), None);
    }
}
