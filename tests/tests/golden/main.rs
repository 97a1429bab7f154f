//! Runs every case of `REPA_GOLDEN_DIR` (default: the project's `tests/golden/`) and fails on a kind
//! it does not know. What the kinds hold, and the tolerances, stand in that folder's README. On a GPU with
//! `REPA_TEST_DEVICE` (`case::device`), which is the stand-in's with `REPA_TEST_GPU=stand-in`.

mod case;
mod center_crop;
mod checkpoint;
mod compare;
mod dinov2;
mod encoder;
mod frechet;
mod inception;
mod pos_embed;
mod sample;
mod scores;
mod taesd;
mod train;
mod vae;

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::Command;

use case::Case;
use repa_tests::stand_in::StandIn;

/// One file per kind of case; each checks one case and returns what went wrong.
type Check = fn(&Case) -> Result<(), String>;

fn checks() -> BTreeMap<&'static str, Check> {
    BTreeMap::from([
        ("center_crop", center_crop::check as Check),
        ("dinov2", dinov2::check),
        ("encoder", encoder::check),
        ("checkpoint", checkpoint::check),
        ("frechet", frechet::check),
        ("inception", inception::check),
        ("pos_embed", pos_embed::check),
        ("sample", sample::check),
        ("scores", scores::check),
        ("taesd", taesd::check),
        ("train", train::check),
        ("vae", vae::check),
    ])
}

/// Starts this program again with the stand-in for CUDA where `REPA_TEST_GPU=stand-in`: libraries are looked for where a
/// process is told at its start.
fn take_stand_in() {
    let wanted = std::env::var_os("REPA_TEST_GPU").is_some_and(|name| name == "stand-in");
    if wanted && std::env::var_os("STAND_IN_CAPABILITY").is_none() {
        let mut again = Command::new(std::env::current_exe().expect("this program has a path"));
        StandIn::build(env!("CARGO_TARGET_TMPDIR")).give(again.args(std::env::args_os().skip(1)));
        panic!("{}", again.exec());
    }
}

fn main() {
    take_stand_in();
    let arguments = libtest_mimic::Arguments::from_args();
    let checks = checks();
    let tests = case::find_all()
        .into_iter()
        .map(|case| {
            let check = checks.get(case.kind.as_str()).copied();
            libtest_mimic::Trial::test(format!("{}::{}", case.kind, case.name), move || match check {
                Some(check) => check(&case).map_err(Into::into),
                None => Err(format!("{}: no check for kind {:?}", case.path.display(), case.kind).into()),
            })
        })
        .collect();
    libtest_mimic::run(&arguments, tests).exit();
}
