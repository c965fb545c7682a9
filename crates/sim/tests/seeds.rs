//! Answers for the engine in simulated worlds, and for a seed being one run.
#![forbid(unsafe_code)]

use devsplice_sim::{Options, run};

#[test]
fn seeds_run_without_a_failure() {
    let mut crashes = 0;
    let mut mirror_crashes = 0;
    let mut requests = 0;
    let (mut losses, mut deaths) = (0, 0);
    let (mut deadly, mut legs) = (0, 0);
    for seed in 0..1500 {
        let report = run(seed, Options::default());
        assert_eq!(report.failure, None, "cargo xtask sim --seed {seed} --trace");
        crashes += report.crashes;
        mirror_crashes += report.mirror_crashes;
        requests += report.requests;
        losses += report.losses;
        deaths += report.deaths;
        deadly += report.deadly;
        legs += report.deadly_legs;
    }
    assert!(losses > 1500 && deaths > 250, "{losses} connections and {deaths} servers lost");
    assert!(deadly > 5 && legs > 0, "{deadly} requests that servers died of, {legs} of mirrors");
    assert!(mirror_crashes > 500, "{mirror_crashes} crashes of mirrors");
    assert!(crashes > 1500 && requests > 75_000, "{crashes} crashes, {requests} requests");
}

#[test]
fn a_seed_is_one_run() {
    let options = Options { trace: true, ..Options::default() };
    for seed in 0..100 {
        let (first, second) = (run(seed, options), run(seed, options));
        assert!(first.trace.len() > 20);
        assert_eq!((first.digest, first.trace), (second.digest, second.trace), "seed {seed}");
        let silent = run(seed, Options::default());
        assert_eq!(first.digest, silent.digest, "seed {seed}: a trace changes the run");
    }
    let digest = |seed| run(seed, Options::default()).digest;
    assert_ne!(digest(1), digest(2));
}
