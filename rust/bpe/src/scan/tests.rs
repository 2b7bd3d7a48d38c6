//! Blocks against the plain scanners, and those against fancy-regex, at every level that is here.

use std::sync::OnceLock;

use bytekiln_simd::Level;
use proptest::prelude::*;

use super::Scanner;
use super::classes::{Class, classes};
use crate::pretokenize::regex_ends;

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|level| level.is_here())
}

fn by_blocks(scanner: Scanner, level: Level, text: &str) -> Vec<usize> {
    let mut out = vec![];
    scanner.ends(level, text.as_bytes(), &mut |base, ends| out.extend(ends.iter().map(|&end| base + end as usize)));
    out
}

fn by_character(scanner: Scanner, text: &str) -> Vec<usize> {
    let (mut at, mut out) = (0, vec![]);
    while at < text.len() {
        at = scanner.end(text.as_bytes(), at);
        out.push(at);
    }
    out
}

fn regex(scanner: Scanner) -> &'static fancy_regex::Regex {
    static REGEXES: OnceLock<[fancy_regex::Regex; 3]> = OnceLock::new();
    &REGEXES.get_or_init(|| Scanner::ALL.map(|s| fancy_regex::Regex::new(s.source()).unwrap()))[scanner as usize]
}

fn by_regex(regex: &fancy_regex::Regex, text: &str) -> Vec<usize> {
    let mut out = vec![];
    regex_ends(regex, text, |e| out.push(e)).unwrap();
    out
}

/// All ways to the borders of a text are one.
fn hold(scanner: Scanner, text: &str) {
    let expected = by_character(scanner, text);
    for level in levels() {
        assert_eq!(by_blocks(scanner, level, text), expected, "{scanner:?} {level:?}: {text:?}");
    }
}

fn class_of(c: char) -> Class {
    let mut bytes = [0; 4];
    c.encode_utf8(&mut bytes);
    classes().first(bytes).0
}

#[test]
fn every_code_point_has_the_class_that_the_regular_expressions_give_it() {
    let sources = [r"[\p{Lu}\p{Lt}]", r"\p{Ll}", r"[\p{Lm}\p{Lo}]", r"\p{M}", r"\p{N}", r"\s"];
    let sources = sources.map(|source| fancy_regex::Regex::new(source).unwrap());
    let all: String = (0..=0x10_ffffu32).filter_map(char::from_u32).collect();
    let named = [Class::Upper, Class::Lower, Class::Letter, Class::Mark, Class::Number, Class::Space];
    let mut found = 0;
    for (source, class) in sources.iter().zip(named) {
        for c in source.find_iter(&all) {
            let c = c.unwrap().as_str().chars().next().unwrap();
            assert_eq!(class_of(c), class, "{c:?}");
            found += 1;
        }
    }
    let classed = all.chars().filter(|&c| class_of(c) != Class::Other).count();
    assert_eq!(found, classed);
}

/// Every code point below U+0600, those on both sides of a change of class, and each 101st.
fn code_points() -> impl Iterator<Item = char> {
    let near = |c: char, n: u32| char::from_u32((c as u32).wrapping_add(n)).map(class_of);
    (0..=0x10_ffffu32).filter_map(char::from_u32).filter(move |&c| {
        let own = Some(class_of(c));
        c < '\u{600}' || (c as u32).is_multiple_of(101) || near(c, 1) != own || near(c, u32::MAX) != own
    })
}

#[test]
fn plain_scanners_equal_their_patterns_on_code_points_of_every_class_in_context() {
    for scanner in Scanner::ALL {
        for c in code_points() {
            let text = format!("a{c}b {c}1{c} {c}{c}\n{c} '{c}s  {c}A{c}Ab!{c}x!!{c}\n{c}/'{c}");
            assert_eq!(by_character(scanner, &text), by_regex(regex(scanner), &text), "{scanner:?} {c:?}");
        }
    }
}

const PADDING: &str = "the quick brown fox, 12 of them, jumps over a lazy dog; and so on, it's said: 'Tis a 2024!";

#[test]
fn blocks_equal_the_plain_scanner_wherever_a_character_stands_in_them() {
    let contexts = |c: char| {
        [
            format!("a{c}b {c}1{c} {c}{c}"),
            format!("\n{c} '{c}s  {c}'l{c}l"),
            format!("'v{c} {c}'re '{c}d"),
            format!("!{c}A{c}\n/{c}'s{c}\n {c}"),
        ]
    };
    for scanner in Scanner::ALL {
        for shift in 0..66 {
            for c in ('\0'..='\u{7f}')
                .chain(['é', 'É', 'ſ', '\u{85}', '\u{a0}', '\u{3000}', '\u{301}', '²', '日', '“', '🧑'])
            {
                for context in contexts(c) {
                    hold(scanner, &format!("{}{context}{PADDING}", &PADDING[..shift]));
                    // The same at the end, where blocks are padded.
                    hold(scanner, &format!("{}{context}", &PADDING[..shift]));
                }
            }
        }
        for c in code_points() {
            hold(scanner, &format!("{}{}{PADDING}", &PADDING[..40], contexts(c)[1]));
        }
    }
}

#[test]
fn long_runs_of_one_kind_are_what_the_plain_scanner_finds() {
    let units = [
        "a", "A", "aB", "1", " ", "\n", "\r\n", " \n", "\n ", "!", "/", "\n/", "é", "日", "日A", "\u{301}", "\u{3000}",
        "²", "'s", "'", "'l", "🧑", "\t\u{a0}",
    ];
    for scanner in Scanner::ALL {
        for unit in units {
            for repeats in [1, 2, 20, 21, 31, 32, 63, 64, 65, 127, 300] {
                let run = unit.repeat(repeats);
                hold(scanner, &run);
                for around in [" ", "a", "!", "\n", "1", "é"] {
                    hold(scanner, &format!("{around}{run}{around}"));
                }
            }
        }
    }
}

/// Parts of text that is dense in what the patterns tell apart.
fn nasty() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-zA-Z]{1,4}",
        3 => "'(s|S|d|m|T|t|ll|LL|lL|ve|Ve|re|RE|l|v|r|x|ſ|ſs|K|')",
        2 => prop::sample::select(vec!["ſ", "\u{212a}", "K", "İ", "ß", "Σ", "ά", "Ж", "ж", "é", "É"]).prop_map(String::from),
        2 => " {1,3}",
        3 => "[\t\n\r ]{1,4}",
        1 => prop::sample::select(vec!["\u{85}", "\u{a0}", "\u{2028}", "\u{2029}", "\u{3000}", "\u{1680}", "\u{b}", "\u{c}"]).prop_map(String::from),
        2 => "[0-9]{1,5}",
        1 => prop::sample::select(vec!["٣", "²", "Ⅷ", "½", "१२३४", "１２３４", "𝟘"]).prop_map(String::from),
        2 => "[!-/]{1,4}",
        2 => "[/\n\r]{1,4}",
        2 => prop::sample::select(vec!["\u{301}", "\u{fe0f}", "\u{20e3}", "\u{200d}", "\u{94d}", "e\u{301}", "ก็", "क्ष"]).prop_map(String::from),
        2 => prop::sample::select(vec!["日", "本語", "ª", "ʰ", "ǅ", "ᾈ", "한", "ا"]).prop_map(String::from),
        1 => prop::sample::select(vec!["🧑\u{200d}🚀", "“", "”", "—", "…", "€"]).prop_map(String::from),
        1 => any::<char>().prop_map(String::from),
        1 => "[a-z]{40,90}",
        1 => "[\n ]{40,70}",
    ]
}

fn text() -> impl Strategy<Value = String> {
    prop::collection::vec(nasty(), 0..40).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn blocks_equal_the_plain_scanner(text in text()) {
        for scanner in Scanner::ALL {
            hold(scanner, &text);
        }
    }

    #[test]
    fn plain_scanners_equal_their_patterns(text in text()) {
        for scanner in Scanner::ALL {
            prop_assert_eq!(by_character(scanner, &text), by_regex(regex(scanner), &text), "{:?}", scanner);
        }
    }
}
