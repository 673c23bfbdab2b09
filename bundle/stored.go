package bundle

import (
	"io"

	"github.com/slotota/ota"
)

// Stored is a part as a bundle stores it, from [Reader.Stored]. Among the files
// that are given to [Write] it is one that is copied byte for byte, with all that
// manifest and index say about its content: the level of its compression stays what it
// was, and so do members of [Storage] that this package does not know. It is a
// [File] of the stored bytes.
type Stored struct {
	*io.SectionReader
	entry *entry
	part  Part
	sec   section
}

// Stored returns the named part of the bundle f, all of which r has read in a stream,
// as after [Policy.Verify]. f must not change meanwhile. Errors are of type [*Error];
// they wrap [ota.ErrInvalid] if r has not read all of it, [ErrMissing] if f has no file for that part, or makes its
// index of it, and [ErrNoDigest] if there is no digest of what is stored, as in
// bundles of before 2020 and those that mos create-fw-bundle --compress makes.
func (r *Reader) Stored(f io.ReaderAt, part string) (*Stored, error) {
	p := r.m.Part(part)
	var e *entry
	for _, x := range r.entries[1:] {
		if p != nil && x.name == p.Src && part != r.m.Index {
			e = x
		}
	}
	switch {
	case r.err != io.EOF, r.at != nil:
		return nil, &Error{Off: -1, Err: because(ota.ErrInvalid, "the bundle was not read to its end")}
	case e == nil:
		return nil, &Error{Off: -1, Err: because(ErrMissing, "of part %s", ota.Quote(part))}
	case p.SHA256 == nil, e.method == methodDeflate && p.Storage == nil:
		return nil, &Error{Entry: e.name, Off: -1, Err: because(ErrNoDigest, "of what is stored")}
	}
	s := &Stored{SectionReader: io.NewSectionReader(f, e.off+int64(len(e.raw)), e.packed), entry: e, part: *p}
	if sec := r.sections[part]; sec != nil {
		s.sec = *sec
	}
	return s, nil
}

// compressed says whether devices of Mongoose OS must not see it.
func (s *Stored) compressed() bool {
	return s.part.Storage != nil && s.part.Storage.Encoding != EncodingNone
}

// digest returns the SHA-256 of the stored bytes.
func (s *Stored) digest() [32]byte {
	if s.compressed() {
		return s.part.Storage.SHA256
	}
	return *s.part.SHA256
}

// item returns what is to be written, and says in p what is known about it.
func (s *Stored) item(p *Part) item {
	p.Size, p.SHA1, p.SHA256, p.Storage = s.part.Size, s.part.SHA1, s.part.SHA256, s.part.Storage
	return item{stored: s, sums: sums{sec: s.sec}, kept: -1,
		entry: entry{name: p.Src, method: s.entry.method, crc: s.entry.crc, packed: s.entry.packed, size: s.entry.size}}
}
