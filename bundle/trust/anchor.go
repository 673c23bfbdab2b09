package trust

import (
	"bytes"
	"slices"
	"time"
)

// MaxChain is the greatest length of a chain in bytes: some 300 records with four
// keys and four signatures each.
const MaxChain = 256 << 10

// Anchor is a verified chain of trust records, of which the last one counts. Only
// [Open] and [Anchor.Update] make one; the zero value trusts nobody.
type Anchor struct {
	links []link
}

// link is a record of a chain.
type link struct {
	note *Note
	rec  *Record
}

// Open returns the anchor that a chain leads to. Its first record is trusted because
// the caller does: it is built into a firmware, or was put into the device where it
// was made. Every record must be signed by enough of its own root keys, and every
// one but the first by enough of those of the one before, whose next version it has.
//
// Errors wrap [ErrFormat], [ErrTooLarge], [ErrKey], [ErrRecord], [ErrVersion],
// [ErrSignature] or [ErrUnsigned].
func Open(chain []byte) (*Anchor, error) {
	links, err := parseChain(chain)
	if err != nil {
		return nil, err
	}
	if err := verifyChain(nil, links); err != nil {
		return nil, err
	}
	return &Anchor{links}, nil
}

// Update returns the anchor that a leads to by way of the chain; a itself stays as it
// is. The chain may begin with the version after that of a, or earlier; then it must
// have the same record of that version, and what it has before is not looked at.
//
// The errors are those of [Open]; [ErrOld] if the chain has no newer record than a
// has, and [ErrFork] if a record of the same version differs.
func (a *Anchor) Update(chain []byte) (*Anchor, error) {
	links, err := parseChain(chain)
	if err != nil {
		return nil, err
	}
	now := a.last()
	first, last := links[0].rec.Version, links[len(links)-1].rec.Version
	if first <= now.rec.Version && last >= now.rec.Version && links[now.rec.Version-first].note.Text != now.note.Text {
		return nil, because(ErrFork, "version %d", now.rec.Version)
	}
	switch {
	case last <= now.rec.Version:
		return nil, because(ErrOld, "version %d, have %d", last, now.rec.Version)
	case first > now.rec.Version+1:
		return nil, because(ErrVersion, "version %d after %d", first, now.rec.Version)
	}
	links = links[now.rec.Version+1-first:]
	if err := verifyChain(now, links); err != nil {
		return nil, err
	}
	b := &Anchor{slices.Concat(a.links, links)}
	if n := len(b.Bytes()); n > MaxChain {
		return nil, because(ErrTooLarge, "a chain of %d bytes, at most %d", n, MaxChain)
	}
	return b, nil
}

// parseChain reads records one after the other, with consecutive versions.
func parseChain(b []byte) ([]link, error) {
	if len(b) > MaxChain {
		return nil, because(ErrTooLarge, "a chain of %d bytes, at most %d", len(b), MaxChain)
	}
	var links []link
	for len(b) > 0 || len(links) == 0 {
		// A first line occurs nowhere else in a record.
		end := len(b)
		if i := bytes.Index(b, []byte("\n"+recordHeader)); i >= 0 {
			end = i + 1
		}
		n, r, err := parseSigned(b[:end])
		if err != nil {
			return nil, err
		}
		if k := len(links); k > 0 && r.Version != links[k-1].rec.Version+1 {
			return nil, because(ErrVersion, "version %d after %d", r.Version, links[k-1].rec.Version)
		}
		links, b = append(links, link{n, r}), b[end:]
	}
	return links, nil
}

func parseSigned(b []byte) (*Note, *Record, error) {
	n, err := ParseNote(b)
	if err != nil {
		return nil, nil, err
	}
	r, err := ParseRecord(n.Text)
	return n, r, err
}

// verifyChain verifies consecutive records, the first of them against before, if
// there is one.
func verifyChain(before *link, links []link) error {
	for i := range links {
		l := &links[i]
		if before != nil {
			if _, err := l.note.verify(&before.rec.Root, "old root"); err != nil {
				return err
			}
		}
		if _, err := l.note.verify(&l.rec.Root, "root"); err != nil {
			return err
		}
		before = l
	}
	return nil
}

func (a *Anchor) last() *link {
	if len(a.links) == 0 {
		return &link{&Note{}, &Record{}}
	}
	return &a.links[len(a.links)-1]
}

// Record returns a copy of the record that counts. That of the zero Anchor has
// Version 0.
func (a *Anchor) Record() Record {
	r := *a.last().rec
	r.Root.Keys, r.Release.Keys = slices.Clone(r.Root.Keys), slices.Clone(r.Release.Keys)
	return r
}

// Bytes returns the whole chain, which [Open] reads.
func (a *Anchor) Bytes() []byte {
	var b []byte
	for _, l := range a.links {
		b = append(b, l.note.Bytes()...)
	}
	return b
}

// Expired returns an error that wraps [ErrExpired] if the record that counts has
// expired at that time.
func (a *Anchor) Expired(now time.Time) error {
	if e := a.last().rec.Expires; !e.IsZero() && !now.Before(e) {
		return because(ErrExpired, "on %s", e.Format(time.RFC3339))
	}
	return nil
}

// VerifyManifest returns the release keys that have signed a manifest, if they are
// enough. note is the whole note about it.
//
// Errors wrap [ErrFormat], [ErrTooLarge], [ErrText], [ErrSignature] or [ErrUnsigned].
func (a *Anchor) VerifyManifest(manifest, note []byte) ([]Key, error) {
	n, err := ParseNote(note)
	if err != nil {
		return nil, err
	}
	if n.Text != ManifestText(manifest) {
		return nil, because(ErrText, "%s", ManifestText(manifest))
	}
	return n.verify(&a.last().rec.Release, "release")
}
