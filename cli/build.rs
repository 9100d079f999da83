//! Tells the program the commit from which it is built: `SLUICE_COMMIT`, as packaging sets it, or the answer of git.
//!
//! This is only for builds that are distributed. During development, every commit would compile the program again, and between
//! commits the answer would be wrong.

use std::path::Path;
use std::process::Command;

const VARIABLE: &str = "SLUICE_COMMIT";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let given = std::env::var(VARIABLE).ok().filter(|commit| !commit.is_empty());
    let is_release = std::env::var("PROFILE").is_ok_and(|profile| profile == "release");
    if let Some(commit) = given.or_else(|| is_release.then(commit).flatten()) {
        println!("cargo::rustc-env={VARIABLE}={commit}");
    }
}

/// The commit that is checked out, if this is a repository and git is installed. Cargo asks again when it changes.
fn commit() -> Option<String> {
    // The reference changes with every commit, HEAD with every change of branch; either may be in a pack.
    let places = [git(&["rev-parse", "--git-path", "HEAD"]), git(&["rev-parse", "--git-path", "logs/HEAD"])];
    for place in places.into_iter().flatten().filter(|place| Path::new(place).exists()) {
        println!("cargo::rerun-if-changed={place}");
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}

fn git(args: &[&str]) -> Option<String> {
    let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
    let said = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (!said.is_empty()).then_some(said)
}
