//! Text → ids and back.
//!
//! In: a [`Vocab`]. Out: [`Encoder`], which is immutable and may be used by any number of threads; each call
//! borrows a table of the words that were met. Called by `corpus` and the binding; `naive` is the specification.
//!
//! Rooms: `ids` (how wide an id is, where ids go) < `simd`, `pairs` (which pairs merge) < `merge`, `window`, `lockstep` (a word's bytes →
//! its ids), `table` (words met before) < `words` < here. A word met before is one look-up; a new one is merged in time that
//! grows as its length does. `decode` is the way back.

mod decode;
mod ids;
mod lockstep;
mod merge;
mod pairs;
#[cfg(target_arch = "x86_64")]
mod registers;
mod simd;
mod table;
mod window;
mod words;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread;

use bytekiln_simd::Level;

use self::decode::SlotsMade;
pub use self::decode::{Decoding, Ids, NO_ID, room_for};
use self::ids::Id;
use self::ids::no_memory;
pub use self::ids::{Out, Packed};
use self::merge::{Core, are_narrow};
use self::words::Scratch;
use crate::error::{Error, Result};
use crate::pages;
use crate::pretokenize::{Ends, Pattern, Piece, Run, SplitStream, Splitter, TextPolicy, valid_text};
use crate::train::TokenId;
use crate::turns::Turns;
use crate::vocab::Vocab;

/// Bytes of a large text that a thread takes at a time: with their ids they stay in the second cache.
const PART: usize = 256 << 10;
/// How often a lock is asked for.
const TRIES: usize = 200;
/// Bytes of text that make another thread worth starting.
const BATCH_BYTES_A_THREAD: usize = 1 << 16;

/// Which special tokens a text may contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed<'a> {
    /// None: their text is ordinary text.
    None,
    /// Every special token of the vocabulary.
    All,
    /// Those named; the others are ordinary text.
    Only(&'a [String]),
}

/// The merges, in the narrowest ids that hold them, and the word tables that no call works with now.
#[derive(Debug)]
enum Width {
    Narrow(Box<Core<u16>>, Idle<u16>),
    Wide(Box<Core<u32>>, Idle<u32>),
}

type Idle<I> = Mutex<Vec<Scratch<I>>>;

/// Takes what a text is split into; ids go where the job wants them.
pub(crate) trait Take {
    /// Words of a text that follow each other.
    fn run(&mut self, text: &[u8], ends: &Ends<'_>);
    /// One word.
    fn word(&mut self, word: &[u8]);
    /// The id of a special token, or of what else is no text.
    fn id(&mut self, id: TokenId);
}

/// A job that encodes: an error of its output is kept until its end.
struct Job<'a, I: Id, O> {
    core: &'a Core<I>,
    vocab: &'a Vocab,
    scratch: &'a mut Scratch<I>,
    out: &'a mut O,
    done: Result<()>,
}

impl<I: Id, O: Out> Take for Job<'_, I, O> {
    fn run(&mut self, text: &[u8], ends: &Ends<'_>) {
        if self.done.is_ok() {
            self.done = self.core.run(self.vocab, text, ends, self.scratch, self.out);
        }
    }

    fn word(&mut self, word: &[u8]) {
        if self.done.is_ok() {
            self.done = self.core.word(self.vocab, word, self.scratch, self.out);
        }
    }

    fn id(&mut self, id: TokenId) {
        if self.done.is_ok() {
            self.done = self.core.id(self.vocab, I::of(id), self.scratch, self.out);
        }
    }
}

/// Encodes and decodes with one vocabulary.
#[derive(Debug)]
pub struct Encoder {
    vocab: Vocab,
    width: Width,
    /// Splits at every special token.
    splitter: Arc<Splitter>,
    /// Takes special tokens as text.
    ordinary: Arc<Splitter>,
    /// In the order of the splitter's special tokens.
    special_ids: Arc<[TokenId]>,
    hash: OnceLock<String>,
    slots: SlotsMade,
}

impl Encoder {
    /// Prepares the tables of a vocabulary.
    pub fn new(vocab: Vocab) -> Result<Self> {
        let pattern = Arc::new(Pattern::new(vocab.pattern())?);
        let level = Level::of_process().map_err(Error::Config)?;
        let texts: Vec<String> = vocab.specials().iter().map(|special| special.0.clone()).collect();
        Ok(Self {
            width: if are_narrow(&vocab) {
                Width::Narrow(Box::new(Core::new(&vocab, level)), Mutex::default())
            } else {
                Width::Wide(Box::new(Core::new(&vocab, level)), Mutex::default())
            },
            splitter: Arc::new(Splitter::new(pattern.clone(), &texts)?),
            ordinary: Arc::new(Splitter::new(pattern, &[])?),
            special_ids: vocab.specials().iter().map(|special| special.1).collect(),
            hash: OnceLock::new(),
            slots: SlotsMade::default(),
            vocab,
        })
    }

    /// The vocabulary.
    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// [`Vocab::hash`], computed when it is first asked for.
    pub fn hash(&self) -> &str {
        self.hash.get_or_init(|| self.vocab.hash())
    }

    /// The splitter that recognises every special token.
    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    /// Runs `f` with what takes words, and with a word table that earlier calls may have filled; ids go to `out`.
    ///
    /// # Errors
    /// What `f` says; [`Error::Memory`].
    pub(crate) fn with<R>(&self, out: &mut impl Out, f: impl FnOnce(&mut dyn Take) -> Result<R>) -> Result<R> {
        match &self.width {
            Width::Narrow(core, idle) => self.with_idle(core, idle, out, f),
            Width::Wide(core, idle) => self.with_idle(core, idle, out, f),
        }
    }

    fn with_idle<I: Id, R>(
        &self,
        core: &Core<I>,
        idle: &Idle<I>,
        out: &mut impl Out,
        f: impl FnOnce(&mut dyn Take) -> Result<R>,
    ) -> Result<R> {
        let unused = lock(idle).and_then(|mut idle| idle.pop());
        let mut scratch = unused.unwrap_or_else(|| Scratch::new(core.level));
        let mut job = Job { core, vocab: &self.vocab, scratch: &mut scratch, out, done: Ok(()) };
        let result = f(&mut job);
        let result =
            job.done.and(result).and_then(|result| core.hand_on(&self.vocab, &mut scratch, out).map(|()| result));
        if result.is_err() {
            scratch.forget();
        }
        if let Some(mut idle) = lock(idle) {
            idle.push(scratch);
        }
        result
    }

    /// Appends the ids of `text`.
    ///
    /// # Errors
    /// [`Error::Config`] where `allowed` names what is not a special token, [`Error::Text`] where a pattern of
    /// the user's cannot be matched, [`Error::Memory`].
    pub fn encode(&self, text: &str, allowed: Allowed<'_>, out: &mut impl Out) -> Result<()> {
        let (splitter, ids) = self.splitter_for(allowed)?;
        self.with(out, |take| splitter.split_runs(text, |run| take_run(take, text.as_bytes(), run, &ids)))
    }

    /// The same of bytes that must be UTF-8, part by part: a part stays in the second cache while it is checked, looked
    /// through for special tokens and encoded. On several threads each takes the next part.
    ///
    /// # Errors
    /// As [`Self::encode`], and [`Error::Text`] with the place of what is not UTF-8.
    pub fn encode_on_threads<T: Copy + Send + Sync>(
        &self,
        text: &[u8],
        allowed: Allowed<'_>,
        threads: usize,
        out: &mut Vec<T>,
    ) -> Result<()>
    where
        Vec<T>: Out,
    {
        if text.len() >= PART {
            // Of English text as much as it takes. Memory that is not touched costs nothing, and less than this will do.
            let _ = out.try_reserve(text.len() / 4);
            pages::large(out);
        }
        let (splitter, ids) = self.splitter_for(allowed)?;
        let encode = |part: &[u8], take: &mut dyn Take| match simdutf8::basic::from_utf8(part) {
            Ok(part) => splitter.split_runs(part, |run| take_run(take, part.as_bytes(), run, &ids)),
            // Where something else than UTF-8 is cut is anybody's guess: the whole tells the place.
            Err(_) => valid_text(text).and_then(|_| Err(Error::Text("text: a part was cut inside a character".into()))),
        };
        let threads = threads.min(text.len() / PART);
        if threads < 2 {
            return self.with(out, |take| parts(text, &splitter).try_for_each(|part| encode(part, take)));
        }
        let parts: Vec<&[u8]> = parts(text, &splitter).collect();
        let (next, place) = (AtomicUsize::new(0), Turns::new(out, threads));
        place.work(threads, || {
            let mut own = Vec::new();
            while let number = next.fetch_add(1, Relaxed)
                && let Some(part) = parts.get(number)
            {
                own.clear();
                self.with(&mut own, |take| encode(part, take))?;
                place.bring(number as u64, &mut own, Vec::new, |out, part| {
                    out.try_reserve(part.len()).map_err(no_memory)?;
                    out.extend_from_slice(part);
                    Ok(())
                })?;
            }
            Ok(())
        })
    }

    /// Appends the ids of bytes that need not be UTF-8.
    ///
    /// # Errors
    /// As [`Self::encode`], and as `policy` says.
    pub fn encode_bytes(
        &self,
        bytes: &[u8],
        policy: TextPolicy,
        allowed: Allowed<'_>,
        out: &mut impl Out,
    ) -> Result<()> {
        if let Ok(text) = simdutf8::basic::from_utf8(bytes) {
            return self.encode(text, allowed, out);
        }
        let (splitter, ids) = self.splitter_for(allowed)?;
        self.with(out, |take| {
            splitter.split_bytes(bytes, policy, |piece| match piece {
                Piece::Word(word) => take.word(word),
                Piece::Special(index) => take.id(ids[index]),
            })
        })
    }

    /// Ids of each text, on up to `threads` threads; small batches stay on this one.
    pub fn encode_batch(&self, texts: &[&str], allowed: Allowed<'_>, threads: usize) -> Result<Vec<Vec<TokenId>>> {
        let encode = |text: &&str| {
            let mut ids = Vec::new();
            self.encode(text, allowed, &mut ids).map(|()| ids)
        };
        let bytes: usize = texts.iter().map(|text| text.len()).sum();
        let threads = threads.min(bytes / BATCH_BYTES_A_THREAD).min(texts.len());
        if threads < 2 {
            return texts.iter().map(encode).collect();
        }
        // Each thread takes the next text, so that one long text does not hold up the others.
        let next = AtomicUsize::new(0);
        let work = || -> Result<Vec<(usize, Vec<TokenId>)>> {
            let mut own = Vec::new();
            while let index = next.fetch_add(1, Relaxed)
                && let Some(text) = texts.get(index)
            {
                own.push((index, encode(text)?));
            }
            Ok(own)
        };
        let parts = thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut parts = vec![work()];
            parts.extend(others.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))));
            parts
        });
        let mut all = vec![Vec::new(); texts.len()];
        for part in parts {
            for (index, ids) in part? {
                all[index] = ids;
            }
        }
        Ok(all)
    }

    /// Fails if `text` holds one of the `disallowed` special tokens that `allowed` does not allow.
    pub fn refuse(&self, text: &str, disallowed: Allowed<'_>, allowed: Allowed<'_>) -> Result<()> {
        let names = |set: Allowed<'_>, name: &str| match set {
            Allowed::None => false,
            Allowed::All => true,
            Allowed::Only(names) => names.iter().any(|n| n == name),
        };
        let specials = self.vocab.specials().iter().map(|special| special.0.as_str());
        let mut refused = specials.filter(|s| names(disallowed, s) && !names(allowed, s));
        match refused.find_map(|special| text.find(special).map(|at| (special, at))) {
            None => Ok(()),
            Some((special, at)) => Err(Error::Text(format!(
                "byte offset {at}: special token {special:?} in the text; expected none, \
                 or allow it (allowed_special) or take it as text (disallowed_special=())"
            ))),
        }
    }

    /// A text that arrives in parts, encoded exactly as the whole.
    pub fn stream(self: Arc<Self>, allowed: Allowed<'_>) -> Result<EncodeStream> {
        let (splitter, special_ids) = self.splitter_for(allowed)?;
        Ok(EncodeStream { encoder: self, splitter, special_ids, parts: SplitStream::default() })
    }

    pub(crate) fn special_ids(&self) -> &[TokenId] {
        &self.special_ids
    }

    /// A splitter for a choice of special tokens, and their ids in its order.
    fn splitter_for(&self, allowed: Allowed<'_>) -> Result<(Arc<Splitter>, Arc<[TokenId]>)> {
        match allowed {
            Allowed::None => Ok((self.ordinary.clone(), Arc::default())),
            Allowed::All => Ok((self.splitter.clone(), self.special_ids.clone())),
            Allowed::Only(names) => {
                let ids = names.iter().map(|name| {
                    let found = self.vocab.specials().iter().find(|special| &special.0 == name);
                    found.map(|special| special.1).ok_or_else(|| {
                        Error::Config(format!(
                            "allowed_special: {name:?} is not a special token; expected some of {:?}",
                            self.splitter.specials()
                        ))
                    })
                });
                let ids = ids.collect::<Result<Arc<[TokenId]>>>()?;
                Ok((Arc::new(Splitter::new(self.splitter.pattern().clone(), names)?), ids))
            }
        }
    }

    /// The pieces of `text` inside which merges happen; special tokens count as text.
    pub fn pretokenize(&self, text: &str) -> Result<Vec<String>> {
        let mut pieces = Vec::new();
        self.ordinary.split(text, |piece| {
            if let Piece::Word(word) = piece {
                pieces.push(String::from_utf8_lossy(word).into_owned());
            }
        })?;
        Ok(pieces)
    }
}

/// Encodes a text that arrives in parts; what cannot be decided yet is held back.
#[derive(Debug)]
pub struct EncodeStream {
    encoder: Arc<Encoder>,
    splitter: Arc<Splitter>,
    special_ids: Arc<[TokenId]>,
    parts: SplitStream,
}

impl EncodeStream {
    /// Takes a part; appends the ids that it completes.
    pub fn push(&mut self, part: &str, out: &mut impl Out) -> Result<()> {
        let Self { encoder, splitter, special_ids, parts } = self;
        encoder.with(out, |take| parts.push(splitter, part, |text, run| take_run(take, text, run, special_ids)))
    }

    /// The text has ended: appends what was held back.
    pub fn finish(&mut self, out: &mut impl Out) -> Result<()> {
        let Self { encoder, splitter, special_ids, parts } = self;
        let parts = std::mem::take(parts);
        encoder.with(out, |take| parts.finish(splitter, |text, run| take_run(take, text, run, special_ids)))
    }
}

/// A lock that is held for some instructions only. One that another thread held when this process was forked off is
/// never given back here: then there is none.
fn lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    (0..TRIES).find_map(|_| {
        mutex.try_lock().ok().or_else(|| {
            thread::yield_now();
            None
        })
    })
}

/// A text cut where no pre-token and no special token spans the cut.
fn parts<'t>(text: &'t [u8], splitter: &Splitter) -> impl Iterator<Item = &'t [u8]> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let mut wanted = PART;
        while wanted < rest.len() {
            if let Some(part) = splitter.safe_cut(&rest[..wanted]).and_then(|cut| rest.split_off(..cut)) {
                return Some(part);
            }
            wanted *= 2;
        }
        Some(std::mem::take(&mut rest)).filter(|part| !part.is_empty())
    })
}

fn take_run(take: &mut dyn Take, text: &[u8], run: Run<'_>, special_ids: &[TokenId]) {
    match run {
        Run::Words(ends) => take.run(text, &ends),
        Run::Special(index) => take.id(special_ids[index]),
    }
}
