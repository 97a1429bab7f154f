//! Images by the thousand for an evaluator, drawn by all ranks, under real mpirun. Some five seconds.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use repa_tests::{Running, mpirun, repa_dist, small_model, small_store};

const DEADLINE: Duration = Duration::from_secs(120);

fn code(command: &mut Command, code: i32) -> repa_tests::Ended {
    Running::start(command).wait(DEADLINE).expect_code(code)
}

#[test]
fn any_number_of_ranks_draws_the_same_images() {
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    small_store(&at("store"), 23);
    let settings = small_model(&at("store"), &at("run"));
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    // Far enough for classes to differ.
    code(&mut mpirun(1, &[&settings[..], &["optimizer.learning_rate=0.05"]].concat()), 0);

    let path = "../trainer/assets/quickstart-autoencoder.safetensors";
    let autoencoder =
        format!("sample.autoencoder={}", Path::new(env!("CARGO_MANIFEST_DIR")).join(path).display());
    let run = format!("--run={}", at("run").display());
    let settings = [&autoencoder, "sample.batch=6", "sample.solver.num_steps=2", "train.threads=1"];
    let npz = |name: &str| format!("--npz={}", at("made").join(name).display());
    let draw = |ranks: usize, name: &str, more: &[&str], expected: i32| {
        let (command, npz) = (["sample", &run, "--raw-weights", "--samples=17"], npz(name));
        let arguments = [&command[..], &[&npz], &settings, more].concat();
        let mut command = if ranks == 0 { repa_dist(&arguments) } else { mpirun(ranks, &arguments) };
        code(&mut command, expected)
    };
    let made = |npz: &str| std::fs::read(at("made").join(npz)).unwrap_or_else(|e| panic!("{npz}: {e}"));
    for ranks in [1, 2, 3] {
        let name = format!("{ranks}.npz");
        let said = draw(ranks, &name, &[], 0).stdout;
        assert!(said.contains("17 samples of step 12: "), "{said}");
        assert!(made(&name) == made("1.npz"), "{ranks} ranks draw others");
    }
    let text = String::from_utf8_lossy(&made("1.npz")).into_owned();
    assert!(text.contains("arr_0.npy") && text.contains("'shape': (17, "), "{}", &text[..200]);

    // Where the data are not, and of a checkpoint that is named.
    std::fs::rename(at("store"), at("elsewhere")).expect("moved");
    draw(2, "without.npz", &[], 0);
    assert!(made("without.npz") == made("1.npz"), "the data decide nothing but what latents are");
    let step = format!("--checkpoint={}", at("run/checkpoints/step-00000012").display());
    draw(1, "named.npz", &[&step], 0);
    assert!(made("named.npz") == made("1.npz"));
    let none = format!("--checkpoint={}", at("run/checkpoints/step-00000011").display());
    draw(1, "no.npz", &[&none], 3).expect_error(&["step-00000011"]);
    std::fs::rename(at("run/latents.json"), at("kept")).expect("moved");
    draw(2, "no.npz", &[], 3).expect_error(&["there are no data at", "keeps no latents.json", "data.dir="]);
    std::fs::rename(at("kept"), at("run/latents.json")).expect("moved");
    std::fs::rename(at("elsewhere"), at("store")).expect("moved");

    // One process without mpirun, and classes in turn.
    draw(0, "even.npz", &["--even-classes"], 0);
    assert_eq!(made("even.npz").len(), made("1.npz").len());
    assert!(made("even.npz") != made("1.npz"), "classes are random otherwise");

    // One rank tells, and what cannot be written is told before hours of work.
    let ended = draw(2, "none.npz", &["sample.solver.num_steps=0"], 2);
    assert_eq!(ended.stderr.matches("sample.solver.num_steps").count(), 1, "{}", ended.stderr);
    std::fs::create_dir(at("made/none.npz")).expect("a folder in its place");
    draw(2, "none.npz", &[], 2).expect_error(&["cannot write", "none.npz"]);
    code(&mut repa_dist(&["sample", &run, "--samples=5"]), 2).expect_error(&["--npz"]);
}
