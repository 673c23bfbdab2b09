package bundle

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"hash/crc32"
	"io"
	"math"
	"slices"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle/trust"
)

// File is the content of an entry to be written, such as a *bytes.Reader or an
// *io.SectionReader. It is read twice, and must yield the same both times.
type File interface {
	io.ReaderAt
	Size() int64
}

// WriteOptions configure [Write]. The zero value writes an unsigned bundle.
type WriteOptions struct {
	// Keys are the P-256 private keys to sign with; the index of a key is that
	// of its signature, and nil leaves an index out. There is room for four
	// signatures, fewer beside long Attrs or a long Dir; more are an error that
	// wraps [ErrHeaderTooLong]. Signatures by an *ecdsa.PrivateKey are
	// deterministic (RFC 6979).
	Keys []crypto.Signer
	// NoteKeys sign the note. The same space has room for three signatures
	// altogether then: three of keys with names of 18 bytes on average, or two
	// and one of Keys, or one and two.
	NoteKeys []*trust.Signer
	// Attrs are further members of the extra field that carries signatures.
	// No signature covers them. "note" is not for them if NoteKeys are given.
	Attrs map[string]json.RawMessage
	// Dir is the leading directory of all names, such as "app-1.0", without a
	// slash. Bundles of the Mongoose OS build system have one, those of its
	// bundle tool have none.
	Dir string
}

// Write writes the bundle that m describes to w: the manifest, then the files
// of its parts, in their order. files maps Src of every part that has one to
// its content. Size, SHA1 and SHA256 of these parts are computed; those in m
// are neither used nor changed. Fill parts are written without digests.
//
// The result depends on the arguments alone, and is laid out as by mos
// create-fw-bundle (mongoose-os/mos, common/ourzip): stored, sizes in the
// local headers, no times and attributes. What [Policy.Open] or genuine
// devices would refuse is an error of type [*Error] before anything is
// written. A file that changed between its two readings is one that wraps
// [ota.ErrChanged].
func Write(ctx context.Context, w io.Writer, m *Manifest, files map[string]File, o *WriteOptions) error {
	if o == nil {
		o = &WriteOptions{}
	}
	b := &writer{ctx: ctx, w: w, dir: o.Dir}
	if o.Dir != "" {
		b.dir += "/"
		if !plain(o.Dir, maxDir) {
			return &Error{Entry: b.dir, Off: -1, Err: ErrName}
		}
	}
	m, err := b.measure(m, files)
	if err != nil {
		return err
	}
	text, err := m.text()
	if err == nil && len(text) > maxManifest {
		err = because(ErrTooLarge, "manifest of %d bytes", len(text))
	}
	var extra []byte
	if err == nil {
		extra, err = o.extra(text)
	}
	if err != nil {
		return &Error{Entry: ManifestName, Off: -1, Err: err}
	}

	first := entry{name: ManifestName, extra: extra, crc: crc32.ChecksumIEEE(text), size: int64(len(text))}
	b.entries = slices.Insert(b.entries, 0, first)
	if err := b.layOut(); err != nil {
		return err
	}
	for i := range b.entries {
		e := &b.entries[i]
		var f File = bytes.NewReader(text)
		if i > 0 {
			f = files[e.name]
		}
		if err := b.write(e.raw); err != nil {
			return err
		}
		sums, err := b.pass(w, f, e.name)
		if err != nil {
			return err
		}
		if sums.crc != e.crc || sums.sha256 != e.sha256 && i > 0 {
			return &Error{Entry: e.name, Off: -1, Err: ota.ErrChanged}
		}
	}
	return b.write(b.directory())
}

// writer is the state of one Write.
type writer struct {
	ctx     context.Context
	w       io.Writer
	dir     string
	entries []entry
	end     int64 // offset of the directory
}

// measure returns m with the sizes and digests of files.
func (b *writer) measure(m *Manifest, files map[string]File) (*Manifest, error) {
	c := *m
	c.Parts = slices.Clone(m.Parts)
	used := map[string]bool{}
	for i := range c.Parts {
		p := &c.Parts[i]
		if p.SHA1, p.SHA256 = nil, nil; p.Src == "" {
			continue
		}
		f := files[p.Src]
		if f == nil {
			return nil, &Error{Entry: p.Src, Off: -1, Err: ErrMissing}
		}
		if used[p.Src] = true; f.Size() > maxFileSize {
			return nil, &Error{Entry: p.Src, Off: -1, Err: ErrTooLarge}
		}
		s, err := b.pass(io.Discard, f, p.Src)
		if err != nil {
			return nil, err
		}
		p.Size, p.SHA1, p.SHA256 = f.Size(), &s.sha1, &s.sha256
		b.entries = append(b.entries, entry{name: p.Src, crc: s.crc, size: p.Size, sha256: s.sha256})
	}
	for name := range files {
		if !used[name] {
			return nil, &Error{Entry: name, Off: -1, Err: ErrExtraEntry}
		}
	}
	return &c, nil
}

// sums are the checksums of a file.
type sums struct {
	crc    uint32
	sha1   [20]byte
	sha256 [32]byte
}

// pass copies f to w.
func (b *writer) pass(w io.Writer, f File, name string) (s sums, err error) {
	crc, h1, h256 := crc32.NewIEEE(), sha1.New(), sha256.New()
	src := &source{ctx: b.ctx, r: io.NewSectionReader(f, 0, f.Size())}
	n, err := io.CopyBuffer(io.MultiWriter(w, crc, h1, h256), src, make([]byte, 32<<10))
	if err == nil && n != f.Size() {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return s, &Error{Entry: name, Off: -1, Err: err}
	}
	return sums{crc.Sum32(), [20]byte(h1.Sum(nil)), [32]byte(h256.Sum(nil))}, nil
}

// text returns the manifest as it is written, which is one that can be read.
func (m *Manifest) text() ([]byte, error) {
	compact, err := m.MarshalJSON()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, compact, "", " "); err != nil {
		return nil, because(ErrManifest, "%w", err)
	}
	_, err = parseManifest(b.Bytes())
	return b.Bytes(), err
}

// extra returns the extra field of the manifest's entry.
func (o *WriteOptions) extra(manifest []byte) ([]byte, error) {
	if len(o.Keys) > MaxKeys {
		return nil, because(ErrPolicy, "more than %d keys", MaxKeys)
	}
	members, err := extras(o.Attrs)
	if err != nil {
		return nil, because(ErrFormat, "attributes: %w", err)
	}
	sum := sha256.Sum256(manifest)
	for i, k := range o.Keys {
		if k == nil {
			continue
		}
		pub, ok := k.Public().(*ecdsa.PublicKey)
		err := errors.New("not a P-256 key")
		if ok {
			_, err = marshalKey(pub)
		}
		if err != nil {
			return nil, because(ErrPolicy, "key %d: %w", i, err)
		}
		random := rand.Reader
		if _, ok := k.(*ecdsa.PrivateKey); ok {
			random = nil
		}
		sig, err := k.Sign(random, sum[:], crypto.SHA256)
		if err != nil {
			return nil, because(ErrSignature, "key %d: %w", i, err)
		}
		members.set(sigNames[i], quote(base64.StdEncoding.EncodeToString(sig)))
	}
	if o.Attrs[noteName] != nil && len(o.NoteKeys) > 0 {
		return nil, because(ErrFormat, "the attribute %q is where the note goes", noteName)
	}
	if len(o.NoteKeys) > 0 {
		n := trust.Note{Text: trust.ManifestText(manifest)}
		if err := n.Sign(o.NoteKeys...); err != nil {
			return nil, because(ErrSignature, "%w", err)
		}
		members.set(noteName, quote(string(n.Bytes())))
	}
	if len(members) == 0 {
		return nil, nil
	}
	members.sort(nil)
	var body bytes.Buffer
	if err := json.Compact(&body, members.marshal()); err != nil {
		return nil, because(ErrFormat, "attributes: %w", err)
	}
	var have signatures
	if _, err := parseExtra(body.Bytes(), &have); err != nil {
		return nil, err
	}
	if have.note != nil && len(o.NoteKeys) == 0 {
		return nil, because(ErrFormat, "the attribute %q is a note, perhaps of another manifest", noteName)
	}
	if body.Len() > maxCentral {
		return nil, because(ErrHeaderTooLong, "%d bytes of signatures and attributes", body.Len())
	}
	x := le.AppendUint16(nil, extraID)
	x = le.AppendUint16(x, uint16(body.Len()))
	return append(x, body.Bytes()...), nil
}

// layOut makes the local headers and finds where everything goes.
func (b *writer) layOut() error {
	for i := range b.entries {
		e := &b.entries[i]
		name := b.dir + e.name
		h := le.AppendUint32(nil, sigLocal)
		h = le.AppendUint16(h, 20)          // version needed
		h = append(h, make([]byte, 2*4)...) // flags, method, time, date
		h = le.AppendUint32(h, e.crc)
		h = le.AppendUint32(h, uint32(e.size))
		h = le.AppendUint32(h, uint32(e.size))
		h = le.AppendUint16(h, uint16(len(name)))
		h = le.AppendUint16(h, uint16(len(e.extra)))
		h = append(h, name...)
		e.raw, e.off = append(h, e.extra...), b.end
		if lenCentral-lenLocal+len(e.raw) > maxCentral {
			return &Error{Entry: e.name, Off: -1, Err: ErrHeaderTooLong}
		}
		b.end += int64(len(e.raw)) + e.size
	}
	if b.end > math.MaxUint32-MaxParts*maxCentral {
		return &Error{Off: -1, Err: ErrTooLarge}
	}
	return nil
}

// directory returns the directory and the end record.
func (b *writer) directory() []byte {
	var d []byte
	for _, e := range b.entries {
		d = le.AppendUint32(d, sigCentral)
		d = le.AppendUint16(d, madeBy)
		d = append(d, e.raw[sharedLocal:sharedLocal+lenShared]...)
		d = append(d, make([]byte, 2+2+2+4)...) // comment, volume, attributes
		d = le.AppendUint32(d, uint32(e.off))
		d = append(d, e.raw[lenLocal:]...)
	}
	n := len(d)
	d = le.AppendUint32(d, sigEnd)
	d = le.AppendUint32(d, 0) // volumes
	d = le.AppendUint16(d, uint16(len(b.entries)))
	d = le.AppendUint16(d, uint16(len(b.entries)))
	d = le.AppendUint32(d, uint32(n))
	d = le.AppendUint32(d, uint32(b.end))
	return le.AppendUint16(d, 0) // comment
}

func (b *writer) write(p []byte) error {
	if err := b.ctx.Err(); err != nil {
		return &Error{Off: -1, Err: err}
	}
	if n, err := b.w.Write(p); err != nil || n != len(p) {
		if err == nil {
			err = io.ErrShortWrite
		}
		return &Error{Off: -1, Err: err}
	}
	return nil
}
