//! Text → one token file.
//!
//! In: inputs and an [`Encoder`]. Out: a token file and its [`Manifest`]. Called by the binding.
//!
//! Every thread takes the next chunk, encodes it, waits for its turn and writes; so the bytes written do not
//! depend on the threads, and memory is threads × chunk whatever the input's size.

use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use crate::encode::{Encoder, Packed};
use crate::error::{Error, Result};
use crate::input::{Chunk, ChunkReader, Inputs};
use crate::pretokenize::{Piece, Run, Splitter, TextPolicy};
use crate::progress::{Progress, Stage};
use crate::tokens::{Dtype, Manifest, Source, TokenWriter, checksum_text, manifest_path};
use crate::train::TokenId;
use crate::turns::Turns;

/// How to encode files; the defaults are those of the command line.
#[derive(Debug, Clone)]
pub struct EncodeOptions {
    /// How an id is stored; `None`: the smallest type that fits.
    pub dtype: Option<Dtype>,
    /// End the text behind a file's last end-of-text token with one more; `None`: in files that contain one.
    pub append_eot: Option<bool>,
    /// Bytes that are not UTF-8.
    pub policy: TextPolicy,
    /// Replace an existing output.
    pub overwrite: bool,
    /// Threads that encode.
    pub threads: usize,
    /// Bytes of text a chunk.
    pub chunk_bytes: usize,
}

/// A chunk after encoding.
struct Encoded {
    ids: Packed,
    text_bytes: u64,
    max_id: Option<TokenId>,
    /// End-of-text tokens in the chunk.
    ends: u64,
    /// Whether text that is more than white space stands behind the chunk's last end of text (or in all of it).
    open_text: bool,
}

/// What is written.
struct Output {
    writer: TokenWriter,
    text_bytes: u64,
    documents: u64,
    max_id: Option<TokenId>,
    /// Of the file that is being written: end-of-text tokens so far, and text behind the last one.
    file_ends: u64,
    file_open: bool,
    file_bytes: u64,
    file_hash: Xxh3,
    sources: Vec<Source>,
}

/// Encodes `inputs`, in their order, into the token file `out`.
pub fn encode_files(
    encoder: &Encoder,
    inputs: &Inputs,
    out: &Path,
    options: &EncodeOptions,
    progress: &Progress,
) -> Result<Manifest> {
    let vocab = encoder.vocab();
    let dtype = options.dtype.unwrap_or_else(|| Dtype::for_vocab(vocab.len()));
    let eot = vocab.eot();
    if options.append_eot == Some(true) && eot.is_none() {
        return Err(Error::Config(
            "append_eot: the tokenizer has no end-of-text token; expected one special token named <|endoftext|>".into(),
        ));
    }
    refuse_input_as_output(inputs, out)?;
    progress.begin(Stage::Encode, inputs.total_bytes());
    let reader = ChunkReader::new(inputs, encoder.splitter(), options.chunk_bytes).stopped_by(progress);
    let output = Turns::new(Output {
        writer: TokenWriter::create(out, dtype, options.overwrite)?,
        text_bytes: 0,
        documents: 0,
        max_id: None,
        file_ends: 0,
        file_open: false,
        file_bytes: 0,
        file_hash: Xxh3::new(),
        sources: Vec::new(),
    });
    let job = Job { encoder, inputs, options, dtype, eot };

    output.work(options.threads, || {
        let mut chunk = Chunk::default();
        let ids = Packed::new(dtype);
        let mut done = Encoded { ids, text_bytes: 0, max_id: None, ends: 0, open_text: false };
        while reader.next(&mut chunk)? {
            progress.check()?;
            job.encode(&chunk, reader.splitter(&chunk), &mut done)?;
            output.wait(chunk.index, |output| job.write(&chunk, &done, output))?;
            progress.add(chunk.read_bytes);
        }
        Ok(())
    })?;
    let output = output.into_inner()?;
    progress.check()?;
    output.writer.finish(|tokens, checksum| Manifest {
        format: "bytekiln-tokens".into(),
        version: 1,
        file: out.file_name().unwrap_or_default().to_string_lossy().into(),
        dtype,
        tokens,
        documents: output.documents,
        text_bytes: output.text_bytes,
        vocab_size: vocab.len(),
        eot_id: eot,
        max_id: output.max_id,
        tokenizer_hash: encoder.hash().into(),
        checksum,
        sources: output.sources,
        created_by: concat!("bytekiln ", env!("CARGO_PKG_VERSION")).into(),
    })
}

struct Job<'a> {
    encoder: &'a Encoder,
    inputs: &'a Inputs,
    options: &'a EncodeOptions,
    dtype: Dtype,
    eot: Option<TokenId>,
}

impl Job<'_> {
    fn encode(&self, chunk: &Chunk, splitter: &Splitter, done: &mut Encoded) -> Result<()> {
        let Encoded { ids, text_bytes, max_id, ends, open_text } = done;
        ids.bytes.clear();
        (*text_bytes, *ends, *open_text) = (0, 0, false);
        let special_ids = self.encoder.special_ids();
        let end_record = self.eot.filter(|_| chunk.records && self.options.append_eot != Some(false));
        self.encoder.with(ids, |take| {
            for (start, text) in chunk.texts() {
                let mut meet = |words: &[u8], special: Option<usize>| match special {
                    None => {
                        *text_bytes += words.len() as u64;
                        *open_text = *open_text || !words.iter().all(u8::is_ascii_whitespace);
                    }
                    Some(index) if Some(special_ids[index]) == self.eot => {
                        *ends += 1;
                        *open_text = false;
                    }
                    Some(_) => *open_text = true,
                };
                let split = match simdutf8::basic::from_utf8(text) {
                    Ok(valid) => splitter.split_runs(valid, |run| match run {
                        Run::Words(ends) => {
                            meet(&text[ends.start..ends.end()], None);
                            take.run(text, &ends);
                        }
                        Run::Special(index) => {
                            meet(&[], Some(index));
                            take.id(special_ids[index]);
                        }
                    }),
                    Err(_) => splitter.split_bytes(text, self.options.policy, |piece| match piece {
                        Piece::Word(word) => {
                            meet(word, None);
                            take.word(word);
                        }
                        Piece::Special(index) => {
                            meet(&[], Some(index));
                            take.id(special_ids[index]);
                        }
                    }),
                };
                split.map_err(|e| self.inputs.locate(chunk, start, e))?;
                if let Some(eot) = end_record {
                    take.id(eot);
                }
            }
            Ok(())
        })?;
        if chunk.records {
            (*ends, *open_text) = (chunk.record_count(), false);
        }
        *max_id = ids.max(0);
        Ok(())
    }

    /// Writes a chunk in its turn.
    fn write(&self, chunk: &Chunk, done: &Encoded, output: &mut Output) -> Result<()> {
        output.writer.write(&done.ids.bytes)?;
        output.file_hash.update(&chunk.bytes);
        output.file_bytes += chunk.bytes.len() as u64;
        output.text_bytes += done.text_bytes;
        output.max_id = output.max_id.max(done.max_id);
        output.documents += done.ends;
        output.file_ends += done.ends;
        output.file_open = done.open_text || (output.file_open && done.ends == 0);
        if !chunk.ends_file {
            return Ok(());
        }
        if output.file_open {
            output.documents += 1;
            let append = self.options.append_eot.unwrap_or(output.file_ends > 0);
            if let (true, Some(eot)) = (append, self.eot) {
                let mut packed = Vec::new();
                self.dtype.pack(&[eot], &mut packed);
                output.writer.write(&packed)?;
                output.max_id = output.max_id.max(Some(eot));
            }
        }
        let name = self.inputs.paths().nth(chunk.file).and_then(Path::file_name);
        output.sources.push(Source {
            name: name.unwrap_or_default().to_string_lossy().into(),
            bytes: std::mem::take(&mut output.file_bytes),
            checksum: checksum_text(&output.file_hash),
        });
        output.file_hash.reset();
        (output.file_ends, output.file_open) = (0, false);
        Ok(())
    }
}

/// The output must not be one of the inputs, under whatever name.
fn refuse_input_as_output(inputs: &Inputs, out: &Path) -> Result<()> {
    for written in [out.to_path_buf(), manifest_path(out)] {
        let Ok(real) = written.canonicalize() else { continue };
        if inputs.paths().any(|path| path.canonicalize().is_ok_and(|input| input == real)) {
            return Err(Error::File { path: written, what: "is one of the inputs; expected another output".into() });
        }
    }
    Ok(())
}
