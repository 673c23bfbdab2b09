package bootrecord

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"time"
	"unicode/utf8"

	"github.com/slotota/ota"
)

// The version of the format that this package writes. A new minor version only
// adds what older readers may ignore; anything else needs a new major version.
const (
	Major = 1
	Minor = 0
)

// MaxSize is the size of the largest record in bytes, and of the smallest
// place of a copy. It holds for every minor version.
const MaxSize = 4096

const (
	magic = "slotrec\x1a"

	headerSize = 64 // up to the message
	slotSize   = 12 // fixed part of the description of a slot
	partSize   = 40
	sumSize    = 4 + 16

	// maxExt bounds the extension area such that it always can be carried over
	// to a record of any state.
	maxExt = MaxSize - headerSize - ota.MaxMessage - sumSize -
		ota.MaxSlots*(slotSize+2*ota.MaxVersion+ota.MaxParts*partSize)

	// maxGeneration leaves generations room to grow, whatever is read.
	maxGeneration = math.MaxInt64
)

const _ = uint(maxExt) // does not compile if the limits outgrow MaxSize

// Bits of the flags of a record and of a slot.
const (
	flagCommitted = 1 << iota
	flagBooted

	flagsKnown = 1<<iota - 1
)

const (
	flagApproved = 1 << iota
	flagRejected

	slotFlagsKnown = 1<<iota - 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// record is the content of a copy.
type record struct {
	minor uint16
	gen   uint64
	// missing has a bit for each copy that could not be written when this
	// generation was made, and that can hold nothing newer since.
	missing uint8
	state   ota.BootState
	ext     []byte // extension area, kept as it is
}

// sum returns the checksum of b.
func sum(b []byte) []byte {
	h := sha256.Sum256(b)
	return append(binary.LittleEndian.AppendUint32(nil, crc32.Checksum(b, castagnoli)), h[:16]...)
}

// check reports which value of r has no place in the format.
func (r *record) check() error {
	s := &r.state
	slot := func(id ota.SlotID) bool { return id >= ota.NoSlot && id < ota.MaxSlots }
	switch {
	case r.gen == 0 || r.gen > maxGeneration:
		return fmt.Errorf("generation %d out of range", r.gen)
	case !slot(s.Active):
		return fmt.Errorf("active slot %d out of range", s.Active)
	case !slot(s.Revert):
		return fmt.Errorf("revert slot %d out of range", s.Revert)
	case !slot(s.Last.Slot):
		return fmt.Errorf("slot %d of the last trial out of range", s.Last.Slot)
	case s.Tries < 0 || s.Tries > math.MaxUint16:
		return fmt.Errorf("%d tries: need 0 to %d", s.Tries, math.MaxUint16)
	case s.CommitTimeout < 0 || s.CommitTimeout > ota.MaxCommitTimeout || s.CommitTimeout%time.Second != 0:
		return fmt.Errorf("commit timeout %v: need whole seconds up to %v", s.CommitTimeout, ota.MaxCommitTimeout)
	case len(s.Slots) > ota.MaxSlots:
		return fmt.Errorf("%d slots: at most %d", len(s.Slots), ota.MaxSlots)
	case len(r.ext) > maxExt:
		return fmt.Errorf("%d bytes of extensions: at most %d", len(r.ext), maxExt)
	}
	// Newer minor versions may know more outcomes and reasons. These are for
	// people and select nothing, so that they must not make a record invalid.
	if r.minor <= Minor && (s.Last.Outcome > ota.OutcomeReverted || s.Last.Reason > ota.ReasonLost) {
		return fmt.Errorf("outcome %d, reason %d of the last trial out of range", s.Last.Outcome, s.Last.Reason)
	}
	for i := range s.Slots {
		if n := len(s.Slots[i].Parts); n > ota.MaxParts {
			return fmt.Errorf("slot %d: %d parts: at most %d", i, n, ota.MaxParts)
		}
		for j, p := range s.Slots[i].Parts {
			if p.Size < 0 {
				return fmt.Errorf("slot %d: part %d: size %d", i, j, p.Size)
			}
		}
	}
	return nil
}

// encode returns the bytes of r. Strings beyond their limits are cut.
func (r *record) encode() ([]byte, error) {
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ota.ErrInvalid)
	}
	s := &r.state
	le := binary.LittleEndian
	message := cut(s.Last.Message, ota.MaxMessage)

	b := make([]byte, 0, 1024)
	b = append(b, magic...)
	b = le.AppendUint16(b, Major)
	b = le.AppendUint16(b, r.minor)
	b = le.AppendUint32(b, 0) // length
	b = le.AppendUint64(b, r.gen)
	b = append(b, byte(s.Active), byte(s.Revert), byte(s.Last.Slot),
		bit(s.Committed, flagCommitted)|bit(s.Booted, flagBooted),
		byte(s.Last.Outcome), byte(s.Last.Reason))
	b = le.AppendUint16(b, uint16(s.Tries))
	b = le.AppendUint32(b, uint32(s.CommitTimeout/time.Second))
	b = append(b, byte(len(message)), byte(len(s.Slots)), r.missing, 0)
	b = le.AppendUint64(b, s.Floor)
	b = append(b, s.Trial[:]...)
	b = append(b, s.Last.Trial[:]...)
	b = append(b, message...)
	for i := range s.Slots {
		t := &s.Slots[i]
		version, build := cut(t.Version, ota.MaxVersion), cut(t.BuildID, ota.MaxVersion)
		b = append(b, bit(t.Approved, flagApproved)|bit(t.Rejected, flagRejected),
			byte(len(t.Parts)), byte(len(version)), byte(len(build)))
		b = le.AppendUint64(b, t.Security)
		b = append(b, version...)
		b = append(b, build...)
		for _, p := range t.Parts {
			b = le.AppendUint64(b, uint64(p.Size))
			b = append(b, p.SHA256[:]...)
		}
	}
	b = append(b, r.ext...)
	le.PutUint32(b[12:], uint32(len(b)+sumSize))
	return append(b, sum(b)...), nil
}

func bit(on bool, mask byte) byte {
	if on {
		return mask
	}
	return 0
}

// cut returns the first n bytes of s, less if they would split a character.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	end := n
	for end > 0 && n-end < utf8.UTFMax && !utf8.RuneStart(s[end]) {
		end--
	}
	if !utf8.RuneStart(s[end]) {
		end = n // not UTF-8 anyway
	}
	return s[:end]
}

// fit returns s as it is read back after it was stored.
func fit(s ota.BootState) ota.BootState {
	s = s.Clone()
	s.Last.Message = cut(s.Last.Message, ota.MaxMessage)
	for i := range s.Slots {
		t := &s.Slots[i]
		t.Version, t.BuildID = cut(t.Version, ota.MaxVersion), cut(t.BuildID, ota.MaxVersion)
	}
	return s
}

// decode reads the record at the start of b and returns it with its bytes. The
// error wraps ErrVersion if the record is sound but of another major version,
// errBlank if there never was one, else ota.ErrBadBootState.
func decode(b []byte) (*record, []byte, error) {
	bad := func(format string, a ...any) (*record, []byte, error) {
		return nil, nil, fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), ota.ErrBadBootState)
	}
	le := binary.LittleEndian
	if blank(b, 0xff) || blank(b, 0) {
		return nil, nil, errBlank
	}
	if !bytes.HasPrefix(b, []byte(magic)) {
		return bad("no magic number")
	}
	// Up to the generation, and in the checksum, all major versions are alike.
	if len(b) < 24+sumSize {
		return bad("%d bytes are too short", len(b))
	}
	n := le.Uint32(b[12:])
	if n < 24+sumSize || n > MaxSize || uint64(n) > uint64(len(b)) {
		return bad("length %d out of range", n)
	}
	b = b[:n]
	if body := b[:n-sumSize]; !bytes.Equal(sum(body), b[n-sumSize:]) {
		return bad("wrong checksum")
	}
	if major := le.Uint16(b[8:]); major != Major {
		return nil, nil, fmt.Errorf("version %d.%d: need %d: %w", major, le.Uint16(b[10:]), Major, ErrVersion)
	}

	c := cursor{b: b[:n-sumSize]}
	h := c.next(headerSize)
	if c.short {
		return bad("length %d: too short", n)
	}
	r := &record{minor: le.Uint16(h[10:]), gen: le.Uint64(h[16:]), missing: h[38]}
	s := &r.state
	s.Active, s.Revert = ota.SlotID(int8(h[24])), ota.SlotID(int8(h[25]))
	s.Last.Slot = ota.SlotID(int8(h[26]))
	s.Committed, s.Booted = h[27]&flagCommitted != 0, h[27]&flagBooted != 0
	s.Last.Outcome, s.Last.Reason = ota.Outcome(h[28]), ota.Reason(h[29])
	s.Tries = int(le.Uint16(h[30:]))
	s.CommitTimeout = time.Duration(le.Uint32(h[32:])) * time.Second
	s.Floor = le.Uint64(h[40:])
	copy(s.Trial[:], h[48:])
	copy(s.Last.Trial[:], h[56:])
	switch {
	case h[27]&^flagsKnown != 0:
		return bad("unknown flags %#x", h[27])
	case h[36] > ota.MaxMessage:
		return bad("message of %d bytes", h[36])
	case h[37] > ota.MaxSlots:
		return bad("%d slots", h[37])
	case h[39] != 0:
		return bad("reserved byte %#x", h[39])
	}
	s.Last.Message = string(c.next(int(h[36])))
	for i := range int(h[37]) {
		f := c.next(slotSize)
		if c.short {
			break
		}
		t := ota.SlotState{
			Approved: f[0]&flagApproved != 0,
			Rejected: f[0]&flagRejected != 0,
			Security: le.Uint64(f[4:]),
		}
		if f[0]&^slotFlagsKnown != 0 || f[1] > ota.MaxParts || f[2] > ota.MaxVersion || f[3] > ota.MaxVersion {
			return bad("slot %d: header % x", i, f[:4])
		}
		t.Version, t.BuildID = string(c.next(int(f[2]))), string(c.next(int(f[3])))
		for range f[1] {
			p := c.next(partSize)
			if c.short {
				break
			}
			t.Parts = append(t.Parts, ota.PartState{Size: int64(le.Uint64(p)), SHA256: [32]byte(p[8:])})
		}
		s.Slots = append(s.Slots, t)
	}
	if c.short {
		return bad("length %d: too short", n)
	}
	if len(c.b) > 0 {
		r.ext = bytes.Clone(c.b)
	}
	if err := r.check(); err != nil {
		return bad("%v", err)
	}
	return r, b, nil
}

// cursor takes bytes off the front of b.
type cursor struct {
	b     []byte
	short bool
}

func (c *cursor) next(n int) []byte {
	if n > len(c.b) {
		c.short = true
		return nil
	}
	p := c.b[:n]
	c.b = c.b[n:]
	return p
}

// blank reports whether all bytes of b have the value v.
func blank(b []byte, v byte) bool {
	for _, x := range b {
		if x != v {
			return false
		}
	}
	return true
}
