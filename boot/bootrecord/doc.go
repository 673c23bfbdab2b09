// Package bootrecord keeps the boot state in a record of the library's own, for
// devices whose boot loader keeps none. The record lives in raw flash ([New],
// [Split]) or in plain files ([Files]).
//
// # Guarantee
//
// The record has K copies, each in erase units or a file of its own. K is the
// number of places given to the constructor: 3 are recommended, 2 the minimum.
// With K copies, K-2 of them may be damaged at a time, in any way (flipped
// bits, torn or lost writes, stale content, bits that read differently each time,
// read and write errors), beside any number of power cuts, and
//
//   - [Record.Load] and [Record.Heal] return the state last stored, or the one
//     whose storing was interrupted, never another;
//   - once Heal has returned a state, or [Record.Store] nil, it stays the state
//     until the next Store.
//
// With 2 copies this holds for power cuts alone, and only if a write that was cut
// reads as damaged: if an interrupted write reads well at times, no order of
// repairing two copies is safe. Two copies still survive the loss of either one
// while nothing is being written.
//
// So that it holds: Store and Heal overwrite what is damaged first and the newest
// copy last, read every copy back, and never touch the last good one before
// another is. Call Heal once after each boot, before anything acts on the state;
// [ota.Boot] and [ota.Open] do. A copy that cannot be read counts as damaged,
// never as absent. A sound record of another major version is left alone
// ([ErrVersion]).
//
// If all is well Load and Heal write nothing, and Store of what is stored
// neither. A copy that cannot be written any more is noted in the others, and
// costs one attempt at each Heal, but wears no other copy.
//
// One Record at a time may use a set of places, in one process, and the order of
// the places must stay the same; copies may be added at the end.
//
// # Format
//
// A copy starts at the start of its place. Numbers are little endian; slot
// numbers are signed, -1 for none. All major versions have the magic number,
// version, length, generation and checksum in common.
//
//	offset  bytes  content
//	     0      8  magic number: "slotrec" 1A
//	     8      2  major version: 1
//	    10      2  minor version: 0
//	    12      4  length of the record, from magic number to checksum; at most 4096
//	    16      8  generation, 1 to 2^63-1; the highest one is the newest
//	    24      1  active slot
//	    25      1  revert slot
//	    26      1  slot of the last result
//	    27      1  flags: 1 committed, 2 booted
//	    28      1  outcome of the last result
//	    29      1  reason of the last result
//	    30      2  tries
//	    32      4  commit timeout, seconds
//	    36      1  length of the message of the last result, at most 96
//	    37      1  number of slots, at most 8
//	    38      1  bit i: copy i was missing when this generation was made
//	    39      1  reserved: 0
//	    40      8  security floor
//	    48      8  trial id
//	    56      8  trial id of the last result
//	    64      …  message
//	     …      …  slots
//	     …      …  extensions, at most 236 bytes
//	   -20      4  CRC-32C (RFC 3720, appendix B.4) of all before
//	   -16     16  first half of the SHA-256 of all before
//
// A slot:
//
//	 0      1  flags: 1 approved, 2 rejected
//	 1      1  number of parts, at most 8
//	 2      1  length of the version, at most 64
//	 3      1  length of the build id, at most 64
//	 4      8  security version
//	12      …  version, build id
//	 …     40  for each part: size in bytes (8), SHA-256 of these bytes (32)
//
// Newer minor versions may only add values of outcome and reason, which select
// nothing, and extensions: each a type (2 bytes), the length of its value (2
// bytes) and the value. Readers ignore what they do not know. Writers carry all
// extensions, and the minor version, over into the next generation, so that a
// firmware or boot stage that is older loses nothing that a newer one wrote.
package bootrecord
