// Package trust says who may sign firmware: keys, signed notes, and the signed
// record of which keys count, which can be replaced by its own signers only.
//
// A note is a text with signatures in the form of C2SP signed-note
// (github.com/C2SP/C2SP, signed-note.md; golang.org/x/mod/sumdb/note), Ed25519
// only. There are two kinds of texts, which differ in their first line, so that
// a signature of one is never one of the other:
//
//   - [ManifestText] names the manifest of a bundle by length and SHA-256. The
//     release keys sign it.
//   - [Record.Text] lists the root keys, the release keys, how many of each must
//     sign, and bounds on the security version. The root keys sign it.
//
// A device begins with a record that is built into its firmware ([Open]), and
// accepts another one only if its version is the next, and enough root keys of
// both the old and the new record have signed it ([Anchor.Update]). Several
// records one after the other, simply concatenated, are a chain; a device that
// was away for long gets from its version to the newest with one. Chains are no
// secret, authenticate themselves, and are fit for files ([Load], [Anchor.Save]).
//
// All functions take bounded time and memory, whatever they are given. Errors
// wrap one of the sentinels below. All types but [Note] are immutable, and may be
// used concurrently.
//
// docs/SIGNING.md describes how to keep and to rotate keys, and the formats in
// all detail.
package trust
