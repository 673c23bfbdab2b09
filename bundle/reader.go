package bundle

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"hash"
	"hash/crc32"
	"io"

	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/strictjson"
)

// Reader reads a bundle from its beginning to its end, once. It is an
// [ota.Image]. It is not for concurrent use.
//
// Next yields the parts that have a file in the order of the archive, then the
// fill parts, and then io.EOF. Before the fill parts it reads the archive's
// directory and end record to the last byte and holds them against all that
// was read before.
//
// Of a part's data the size, the CRC-32 and, if the manifest has one, the
// SHA-1 are checked by the time the last byte is returned; an error comes with
// that byte, again from every later Read, and from Next. The SHA-256 of a part
// whose data the caller reads is the caller's to check, because
// [ota.Device.Update] does so anyway. Next checks all three for parts of which
// nothing was read, and for those that are not to be installed. When a part
// was read to some point but not to its end, Next checks all but the SHA-256.
type Reader struct {
	src   *source
	br    *bufio.Reader
	off   int64 // in the archive
	m     *Manifest
	info  ota.ImageInfo
	attrs map[string]json.RawMessage

	entries []*entry
	seen    map[string]bool // names, folded
	missing int             // files of the manifest still to come
	cur     *data           // of the part offered last
	fills   []ota.ImagePart
	ended   bool // the end of the archive was reached
	scratch []byte
	err     error // what every further call returns
}

// source is the reader below, as it should be.
type source struct {
	ctx context.Context
	r   io.Reader
}

func (s *source) Read(p []byte) (int, error) {
	for range 100 {
		if err := s.ctx.Err(); err != nil {
			return 0, err
		}
		n, err := s.r.Read(p)
		if n < 0 || n > len(p) {
			return 0, errors.New("the source returned an impossible count")
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
	return 0, io.ErrNoProgress
}

func open(ctx context.Context, rd io.Reader, p *Policy) (*Reader, error) {
	src := &source{ctx, rd}
	r := &Reader{src: src, br: bufio.NewReaderSize(src, 4096), seen: map[string]bool{}}
	e, err := r.manifestEntry()
	if err != nil {
		return nil, err
	}
	limit := int64(maxManifest)
	if p.MaxManifest > 0 {
		limit = int64(p.MaxManifest)
	}
	if e.size > limit {
		return nil, r.fail(e, because(ErrTooLarge, "manifest of %d bytes, limit %d", e.size, limit))
	}
	raw := make([]byte, e.size)
	if err := r.read(e, raw); err != nil {
		return nil, err
	}
	if err := r.finish(e, crc32.ChecksumIEEE(raw)); err != nil {
		return nil, err
	}

	// The signature first: nobody else's JSON is looked at.
	var have signatures
	x, err := e.signatures()
	if err != nil {
		return nil, r.fail(e, err)
	}
	if x != nil {
		attrs, err := parseExtra(x, &have)
		if err != nil {
			return nil, r.fail(e, err)
		}
		r.attrs = map[string]json.RawMessage{}
		for _, a := range attrs {
			r.attrs[a.Name] = a.Value
		}
	}
	signers, err := p.verify(raw, &have)
	if err != nil {
		return nil, r.fail(e, err)
	}
	if r.m, err = parseManifest(raw); err == nil {
		err = r.describe(p, signers)
	}
	if err != nil {
		r.err = &Error{Entry: ManifestName, Off: -1, Err: err}
		return nil, r.err
	}
	return r, nil
}

// manifestEntry reads the first header.
func (r *Reader) manifestEntry() (*entry, error) {
	sig, err := r.signature()
	if err != nil {
		return nil, err
	}
	switch sig {
	case sigLocal:
	case sigEnd:
		return nil, r.fail(nil, because(ErrNoManifest, "the archive is empty"))
	default:
		return nil, r.fail(nil, ErrNotZip)
	}
	e, err := r.header()
	if err != nil {
		return nil, err
	}
	if e.name != ManifestName {
		return nil, r.fail(e, ErrNoManifest)
	}
	return e, nil
}

// describe fills in what Info returns, and refuses manifests whose parts have
// not the digests that the policy demands.
func (r *Reader) describe(p *Policy, signers []string) error {
	m := r.m
	r.info = ota.ImageInfo{
		Name: m.Name, Platform: m.Platform, Version: m.Version, BuildID: m.BuildID,
		Security: m.Security, SignedBy: signers, Unsigned: len(signers) == 0,
	}
	if err := p.bound(&r.info); err != nil {
		return err
	}
	var total int64 // of at most 64 sizes of 32 bits
	for i := range m.Parts {
		q := &m.Parts[i]
		sum := q.SHA256
		if q.Src != "" {
			r.missing++
			switch {
			case sum != nil, q.SHA1 != nil && r.info.Unsigned && p.AllowSHA1:
			case q.SHA1 != nil:
				return because(ErrNoDigest, "part %s has a SHA-1 only", ota.Quote(q.Name))
			default:
				return because(ErrNoDigest, "part %s has none", ota.Quote(q.Name))
			}
		} else {
			var err error
			if sum, err = q.fillDigest(r.src); err != nil {
				return because(err, "part %s", ota.Quote(q.Name))
			}
		}
		if total += q.Size; p.MaxSize > 0 && total > p.MaxSize {
			return because(ErrTooLarge, "the parts have more than %d bytes", p.MaxSize)
		}
		if q.NoUpdate {
			continue
		}
		info := ota.PartInfo{Name: q.Name, Size: q.Size, SHA256: sum}
		r.info.Parts = append(r.info.Parts, info)
		if q.Src == "" {
			r.fills = append(r.fills, ota.ImagePart{PartInfo: info, Data: q.content(r.src)})
		}
	}
	return nil
}

// Info implements [ota.Image]. SHA256 of a fill part is computed from its
// description. Parts that are not to be installed are not listed.
func (r *Reader) Info() ota.ImageInfo { return r.info }

// Manifest returns the manifest. It must not be changed.
func (r *Reader) Manifest() *Manifest { return r.m }

// Attrs returns the members beside the signatures in the extra field 0x293a of
// the manifest's entry. No signature covers them. They must not be changed.
func (r *Reader) Attrs() map[string]json.RawMessage { return r.attrs }

// Next implements [ota.Image].
func (r *Reader) Next(ctx context.Context) (*ota.ImagePart, error) {
	r.src.ctx = ctx
	if r.cur != nil {
		if r.err == nil && r.cur.left > 0 {
			_ = r.cur.drain() // leaves its error in r.err
		}
		r.cur.err = errStale
		r.cur = nil
	}
	for r.err == nil && !r.ended {
		e, err := r.next()
		if err != nil {
			return nil, err
		}
		if e == nil {
			continue
		}
		q, err := r.lookUp(e)
		if err != nil {
			return nil, err
		}
		r.cur = newData(r, e, q)
		if q.NoUpdate {
			_ = r.cur.drain()
			continue
		}
		return &ota.ImagePart{PartInfo: ota.PartInfo{Name: q.Name, Size: q.Size, SHA256: q.SHA256}, Data: r.cur}, nil
	}
	if r.err != nil {
		return nil, r.err
	}
	if len(r.fills) == 0 {
		r.err = io.EOF
		return nil, io.EOF
	}
	f := r.fills[0]
	r.fills = r.fills[1:]
	return &f, nil
}

// next reads the next header, or the end of the archive, in which case there
// is no entry.
func (r *Reader) next() (*entry, error) {
	sig, err := r.signature()
	if err != nil {
		return nil, err
	}
	switch sig {
	case sigLocal:
		return r.header()
	case sigCentral:
		return nil, r.end()
	}
	return nil, r.fail(nil, unknown(sig))
}

// lookUp returns the part that e holds the data of.
func (r *Reader) lookUp(e *entry) (*Part, error) {
	if len(e.extra) > 0 {
		return nil, r.fail(e, because(ErrFormat, "the entry has an extra field"))
	}
	for i := range r.m.Parts {
		q := &r.m.Parts[i]
		if q.Src != e.name {
			continue
		}
		if q.Size != e.size {
			return nil, r.fail(e, because(ErrSize, "%d instead of %d", e.size, q.Size))
		}
		r.missing--
		return q, nil
	}
	return nil, r.fail(e, ErrExtraEntry)
}

// signature reads the four bytes that every record begins with.
func (r *Reader) signature() (uint32, error) {
	var b [4]byte
	if err := r.read(nil, b[:]); err != nil {
		return 0, err
	}
	return le.Uint32(b[:]), nil
}

// header reads a local header, but for its signature.
func (r *Reader) header() (*entry, error) {
	off := r.off - 4
	raw := make([]byte, lenLocal, lenLocal+64)
	if err := r.read(nil, raw[4:]); err != nil {
		return nil, err
	}
	raw, err := r.rest(raw, int(le.Uint16(raw[26:]))+int(le.Uint16(raw[28:])), maxHeader)
	if err != nil {
		return nil, err
	}
	e, err := parseLocal(raw, off)
	if err != nil {
		return nil, r.failAt(e, off, err)
	}
	switch {
	case len(r.entries) > 0 && r.seen[strictjson.Fold(e.name)]:
		return nil, r.failAt(e, off, ErrDuplicate)
	case len(r.entries) > 0 && e.dir != r.entries[0].dir:
		return nil, r.failAt(e, off, because(ErrName, "not in the directory of the manifest"))
	}
	r.seen[strictjson.Fold(e.name)] = true
	r.entries = append(r.entries, e)
	return e, nil
}

// rest reads n more bytes of a header, which may have max altogether.
func (r *Reader) rest(raw []byte, n, max int) ([]byte, error) {
	if n > max-len(raw) {
		return nil, r.fail(nil, because(ErrHeaderTooLong, "%d bytes", len(raw)+n))
	}
	k := len(raw)
	raw = append(raw, make([]byte, n)...)
	return raw, r.read(nil, raw[k:])
}

// finish checks what follows the data of e.
func (r *Reader) finish(e *entry, crc uint32) error {
	if e.crc != crc && !(e.crc == 0 && e.descriptor) {
		return r.fail(e, because(ErrCRC, "%08x instead of %08x", crc, e.crc))
	}
	if e.descriptor {
		b, err := r.br.Peek(16)
		if err != nil && !errors.Is(err, io.EOF) {
			return r.fail(e, err)
		}
		n, err := checkDescriptor(b, crc, e.size)
		if err != nil {
			if len(b) < 16 {
				err = ErrTruncated
			}
			return r.fail(e, err)
		}
		if _, err := r.br.Discard(n); err != nil {
			return r.fail(e, err)
		}
		r.off += int64(n)
		// Writers of descriptors may leave the CRC out of the local header,
		// but not out of the directory.
		e.crc = crc
		le.PutUint32(e.raw[14:], crc)
	}
	return nil
}

// end reads the directory, whose first signature is consumed, and the end.
func (r *Reader) end() error {
	if r.missing > 0 {
		return r.fail(nil, because(ErrMissing, "%s", ota.Quote(r.firstMissing())))
	}
	dir := r.off - 4
	for i, e := range r.entries {
		if i > 0 {
			sig, err := r.signature()
			if err != nil {
				return err
			}
			if sig != sigCentral {
				return r.fail(nil, because(ErrMismatch, "the directory has no entry for %s", ota.Quote(e.name)))
			}
		}
		off := r.off - 4
		raw := make([]byte, lenCentral, lenCentral+len(e.raw))
		if err := r.read(e, raw[4:]); err != nil {
			return err
		}
		n := int(le.Uint16(raw[28:])) + int(le.Uint16(raw[30:]))
		raw, err := r.rest(raw, n, maxHeader+lenCentral)
		if err != nil {
			return err
		}
		if err := e.checkCentral(raw); err != nil {
			return r.failAt(e, off, err)
		}
		if !r.info.Unsigned && !bare(raw) {
			return r.failAt(e, off, because(ErrFormat, "a signed archive says who made it, or has attributes"))
		}
	}
	dirSize := r.off - dir
	sig, err := r.signature()
	if err != nil {
		return err
	}
	switch sig {
	case sigEnd:
	case sigCentral:
		return r.fail(nil, because(ErrMismatch, "the directory has more entries than the archive"))
	default:
		return r.fail(nil, unknown(sig))
	}
	raw := make([]byte, lenEnd)
	if err := r.read(nil, raw[4:]); err != nil {
		return err
	}
	if err := checkEnd(raw, len(r.entries), dir, dirSize); err != nil {
		return r.failAt(nil, r.off-lenEnd, err)
	}
	switch _, err := r.br.ReadByte(); err {
	case io.EOF:
	case nil:
		return r.fail(nil, ErrTrailing)
	default:
		return r.fail(nil, err)
	}
	r.ended = true
	return nil
}

func (r *Reader) firstMissing() string {
	for _, q := range r.m.Parts {
		if q.Src != "" && !r.seen[strictjson.Fold(q.Src)] {
			return q.Src
		}
	}
	return ""
}

// read fills b. e is the entry concerned, or nil.
func (r *Reader) read(e *entry, b []byte) error {
	n, err := io.ReadFull(r.br, b)
	r.off += int64(n)
	if err != nil {
		return r.fail(e, err)
	}
	return nil
}

// fail makes err final, with the present offset.
func (r *Reader) fail(e *entry, err error) error { return r.failAt(e, r.off, err) }

func (r *Reader) failAt(e *entry, off int64, err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		err = ErrTruncated
	}
	f := &Error{Off: off, Err: err}
	if e != nil {
		f.Entry = e.name
	}
	r.err = f
	return f
}

// data is the content of an entry, read by the caller or drained by Next.
type data struct {
	r      *Reader
	e      *entry
	q      *Part
	left   int64
	crc    uint32
	sha1   hash.Hash // nil if the manifest has none
	sha256 hash.Hash // nil unless drained from the beginning
	err    error     // once nothing is left
}

func newData(r *Reader, e *entry, q *Part) *data {
	d := &data{r: r, e: e, q: q, left: e.size}
	if q.SHA1 != nil {
		d.sha1 = sha1.New()
	}
	return d
}

// Read implements io.Reader.
func (d *data) Read(p []byte) (int, error) {
	switch {
	case d.left == 0:
		return 0, d.err
	case d.r.cur != d:
		return 0, errStale
	case d.r.err != nil:
		return 0, d.r.err
	case len(p) == 0:
		return 0, nil
	}
	if err := d.r.src.ctx.Err(); err != nil {
		return 0, d.r.fail(d.e, err)
	}
	n, err := d.r.br.Read(p[:min(int64(len(p)), d.left)])
	d.r.off += int64(n)
	d.left -= int64(n)
	d.crc = crc32.Update(d.crc, crc32.IEEETable, p[:n])
	if d.sha1 != nil {
		d.sha1.Write(p[:n])
	}
	if d.sha256 != nil {
		d.sha256.Write(p[:n])
	}
	if err != nil {
		return n, d.r.fail(d.e, err)
	}
	if d.left > 0 {
		return n, nil
	}
	d.err = io.EOF
	if err := d.finish(); err != nil {
		d.err = err
		return n, err
	}
	return n, nil
}

func (d *data) finish() error {
	if err := d.r.finish(d.e, d.crc); err != nil {
		return err
	}
	if d.sha1 != nil && !bytes.Equal(d.sha1.Sum(nil), d.q.SHA1[:]) {
		return d.r.fail(d.e, because(ErrDigest, "SHA-1 of part %s", ota.Quote(d.q.Name)))
	}
	if d.sha256 != nil && !bytes.Equal(d.sha256.Sum(nil), d.q.SHA256[:]) {
		return d.r.fail(d.e, because(ErrDigest, "SHA-256 of part %s", ota.Quote(d.q.Name)))
	}
	return nil
}

// drain reads the rest.
func (d *data) drain() error {
	if d.left == d.e.size && d.q.SHA256 != nil {
		d.sha256 = sha256.New()
	}
	if d.r.scratch == nil {
		d.r.scratch = make([]byte, 32<<10)
	}
	for d.left > 0 {
		if _, err := d.Read(d.r.scratch); err != nil {
			return err
		}
	}
	return nil
}

// fillDigest returns the SHA-256 of a fill part, whose digests it checks.
func (p *Part) fillDigest(src *source) (*[32]byte, error) {
	block := make([]byte, min(p.Size, 16<<10))
	h256, h1 := sha256.New(), sha1.New()
	for f := p.content(src); ; {
		n, err := f.Read(block)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		h256.Write(block[:n])
		if p.SHA1 != nil {
			h1.Write(block[:n])
		}
	}
	sum := [32]byte(h256.Sum(nil))
	if p.SHA256 != nil && *p.SHA256 != sum || p.SHA1 != nil && *p.SHA1 != [20]byte(h1.Sum(nil)) {
		return nil, ErrDigest
	}
	return &sum, nil
}

// content returns the content of a fill part.
func (p *Part) content(src *source) io.Reader { return &fill{src: src, b: *p.Fill, left: p.Size} }

// fill yields left times the byte b.
type fill struct {
	src  *source // whose context counts
	b    byte
	left int64
}

// Read implements io.Reader.
func (f *fill) Read(p []byte) (int, error) {
	if err := f.src.ctx.Err(); err != nil {
		return 0, err
	}
	if f.left == 0 {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), f.left)]
	if len(p) == 0 {
		return 0, nil
	}
	p[0] = f.b
	for n := 1; n < len(p); n *= 2 {
		copy(p[n:], p[:n])
	}
	f.left -= int64(len(p))
	return len(p), nil
}
