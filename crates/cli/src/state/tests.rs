//! Answers for the tests of what is known between commands.

use super::*;

#[test]
fn what_is_longer_than_a_page_is_written_beside_first() {
    let name = format!("state-test-{}", std::process::id());
    let path = path(&name, "json");
    std::fs::create_dir_all(dir()).unwrap();
    let disk = |len| Disk { name: name.clone(), stack: "x".repeat(len), ..Disk::default() };
    let said = || peek(&name).map(|disk| disk.stack.len());
    let (mut claim, left) = Claim::hold(&name).unwrap().unwrap();
    assert!(left.is_none());
    for len in [10, 10_000, 5_000, 20_000, 10] {
        claim.write(&disk(len)).unwrap();
        assert_eq!(said(), Some(len));
        assert!(!super::path(&name, "next").exists());
    }
    // Who wrote it was killed over it: after it had been written beside.
    let next = serde_json::to_string(&disk(30_000)).unwrap();
    write_new(&super::path(&name, "next"), &next).unwrap();
    assert_eq!(said(), Some(30_000), "what stands in the file may be half of it");
    claim.write(&disk(20)).unwrap();
    assert_eq!(said(), Some(20), "nothing from before outranks it");
    write_new(&super::path(&name, "next"), &next).unwrap();
    claim.file.write_all_at(&[b'y'; 4096], 0).unwrap();
    assert_eq!(said(), Some(30_000));
    assert_eq!(claim.read().unwrap().unwrap().stack.len(), 30_000);
    // Junk alone is nobody's to remove.
    std::fs::remove_file(super::path(&name, "next")).unwrap();
    drop(claim);
    let refused = Claim::hold(&name).err().unwrap();
    assert!(refused.to_string().contains(&path.display().to_string()), "{refused}");
    assert!(Claim::take(Some(&name)).is_err() && find(&name).is_err() && path.exists());
    std::fs::remove_file(path).unwrap();
}

#[test]
fn names_that_would_leave_the_directory_are_refused() {
    for name in ["", ".", "..", "a/b", "../x", ".hidden", "a b", "\u{e9}", &"x".repeat(49)] {
        assert!(check_name(name).is_err(), "{name}");
    }
    for name in ["d0", "vm-1.root", "A_b"] {
        assert!(check_name(name).is_ok(), "{name}");
    }
}
