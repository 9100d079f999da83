//! The identity of this program: version, commit, instruction sets, and the versions of what it reads and writes.

use std::env::consts;
use std::fmt::Write as _;
use std::sync::LazyLock;

use sluice_format::{FORMAT_VERSION, READ_VERSIONS};
use sluice_kernels::Kernels;
use sluice_model::session::SESSION_VERSION;

/// The output of `--version`; `-V` prints the first line.
pub(crate) static VERSION: LazyLock<String> = LazyLock::new(|| {
    let here: Vec<_> = Kernels::available().iter().map(Kernels::isa_name).collect();
    let in_use = Kernels::detect().map_or_else(|refused| refused.to_string(), |kernels| kernels.isa_name().to_owned());
    describe(option_env!("SLUICE_COMMIT"), &in_use, &here)
});

fn describe(commit: Option<&str>, isa: &str, available: &[&str]) -> String {
    let mut out = env!("CARGO_PKG_VERSION").to_owned();
    let commit = commit.unwrap_or("not recorded, as this is a build for development or from outside a repository");
    let read = READ_VERSIONS.map(|version| version.to_string()).join(" and ");
    let _ = write!(
        out,
        "\ncommit        {commit}\nsystem        {} {}{}\ninstructions  {isa} in use; this processor has {}\n\
         model files   version {FORMAT_VERSION} is written, {read} are read\n\
         sessions      version {SESSION_VERSION}",
        consts::OS,
        consts::ARCH,
        if cfg!(target_env = "musl") { ", linked with musl" } else { "" },
        available.join(", "),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_a_bug_report_needs() {
        let said = describe(Some("0123456789ab"), "avx2", &["scalar", "avx2"]);
        assert!(said.starts_with(env!("CARGO_PKG_VERSION")), "{said}");
        assert!(said.contains("commit        0123456789ab\n"), "{said}");
        assert!(said.contains("avx2 in use; this processor has scalar, avx2\n"), "{said}");
        assert!(said.contains(&format!("version {FORMAT_VERSION} is written")), "{said}");
        assert!(describe(None, "scalar", &["scalar"]).contains("commit        not recorded"));
    }
}
