//! The bodies of the fuzz targets (`rust/bpe/fuzz`) as property tests: no nightly compiler is needed for these.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test ends where something fails")]

#[path = "../../rust/bpe/fuzz/src/bodies.rs"]
mod bodies;

use proptest::prelude::*;

/// Bytes of which most are text that the patterns cut often; some are any.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let part = prop_oneof![
        6 => "[a-zA-Z' 0-9\r\n!/]{1,12}".prop_map(String::into_bytes),
        2 => prop::sample::select(vec!["<|e|>", "<|e", "'S", "'ll", "'ſ", "é", "日A", "\u{301}", "\u{a0}", "\u{85}", "²", "🧑\u{200d}🚀"])
            .prop_map(|s| s.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..5),
        1 => any::<char>().prop_map(|c| c.to_string().into_bytes()),
    ];
    let choices = prop::collection::vec(any::<u8>(), 2);
    (choices, prop::collection::vec(part, 0..30)).prop_map(|(choices, parts)| [choices, parts.concat()].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn any_bytes_are_split_as_the_regular_expressions_split_them(data in bytes()) {
        bodies::pieces(&data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_words_are_merged_as_the_specification_merges_them(
        wanted in any::<u8>(),
        words in prop_oneof!["[ab\u{0}]{0,120}", "[a-d\u{0} é]{0,200}"],
    ) {
        bodies::merges(&[&[wanted], words.as_bytes()].concat());
    }
}
