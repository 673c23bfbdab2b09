// Package bundle reads, verifies, writes and signs firmware bundles: the
// fw.zip files of Mongoose OS, zip archives of a manifest.json and the files
// of the parts.
//
// A bundle is read as a stream and becomes an [ota.Image]. Memory is bounded,
// whatever the bundle holds and however long it is: the manifest of at most 64
// KiB in parsed form, the headers of at most 65 entries, 4 KiB of buffers, and
// what the [Policy] allows for digests and decompression. docs/BUNDLE.md
// specifies the format.
//
//	policy := &bundle.Policy{Keys: []*ecdsa.PublicKey{key}}
//	image, err := policy.Open(ctx, body)
//	if err != nil {
//		return err
//	}
//	_, err = device.Update(ctx, image, nil)
//
// # What is accepted
//
// An archive that has exactly one meaning. Its bytes are, without anything
// between, before or after them: the entries, of which manifest.json is the
// first; the directory, with the same entries in the same order and the same
// fields; the end record. Entries are stored or, as by mos create-fw-bundle
// --compress, deflate, and say how long they are. Their names are plain, optionally in one directory that is the
// same for all. Every entry is the file of exactly one part of the manifest
// and every part has its file. Comments, extra fields other than 0x293a of the
// manifest, zip64 and encryption are refused.
//
// That is what the build system and the bundle tool of Mongoose OS make, and
// what its devices install. An archive that was unpacked and zipped again
// usually is refused, with a message that says so.
//
// # Compression, chunks, random access
//
// What Mongoose OS does not know stands in the member "ota" of the manifest. A
// part may be stored as independent zstd frames, and have digests of its chunks
// ([Packing], [Storage]); both are listed in an index that comes directly after
// the manifest, so that every frame is checked before it is decoded, and every
// chunk before it is written. Frames are decoded several at a time.
// [Policy.OpenRanges] reads only those that are wanted. Devices of Mongoose OS
// refuse bundles with compressed parts at the first header.
//
// # Signatures
//
// ECDSA P-256 over the SHA-256 of the exact bytes of manifest.json, base64 of
// ASN.1 DER, as members sig0 to sig7 of a JSON object in extra field 0x293a
// (mongoose-os/mos, common/fwbundle). The manifest in turn has the SHA-256 of
// every file. A [Policy] says which signatures are needed.
//
// Beside them there is the note, in the member "note" of the same object: Ed25519
// signatures in the form of C2SP signed-note over a text that names the manifest by
// length and SHA-256. Package trust says whose signatures count. Mongoose OS ignores
// it. Devices with Mongoose OS read 512 bytes of a directory entry, and [Write] and
// [Resign] make none that is longer: three signatures of the note with names of 18
// bytes on average, or two beside one sigN, or one beside two.
//
// In a signed bundle no byte can be changed without notice: one that is accepted
// because of its signatures has nothing in the fields of the directory that say who
// made the archive, and no file attributes.
package bundle
