package bundle

import (
	"bufio"
	"bytes"
	"compress/flate"
	"context"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"hash"
	"hash/crc32"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
	"github.com/slotota/ota"
	"github.com/slotota/ota/internal/strictjson"
)

// Reader reads a bundle from its beginning to its end, once. It is an
// [ota.Image]. It is not for concurrent use, but for Downloaded.
//
// Next yields the parts that have a file in the order of the archive, then the
// fill parts, and then io.EOF. Before the fill parts it reads the archive's
// directory and end record to the last byte and holds them against all that
// was read before.
//
// Of a part's data the size and the CRC-32 are checked by the time the last byte is
// returned; an error comes with that byte, again from every later Read, and from
// Next. So it is with the SHA-1 that the manifest may have, if the bundle is
// unsigned. Of a part that is stored as zstd every frame is checked before it is
// decoded. The SHA-256 of a part whose data the caller reads is the caller's to
// check, because [ota.Device.Update] does so anyway; in a signed bundle, where each
// part has one, SHA-1 of the same bytes would take as long and prove nothing more.
// Next checks all of that, and the SHA-256 of the stored bytes, for parts of which
// nothing was read, and for those that are not to be installed. When a part was read
// to some point but not to its end, Next checks what is checked for who reads it all.
//
// A Reader of a [Source] reads no more of it than it has to. Next passes over
// what was not read of a part, and over parts that are not to be installed:
// nothing of these is checked but their headers. The data of parts that have
// chunks implement [ota.Selector]. Of a part that was read in part because of
// that, only its zstd frames are checked; to check the chunks is up to the
// caller, as with SHA-256.
type Reader struct {
	src   *source
	at    *cursor // what src reads, if that is a Source
	br    *bufio.Reader
	off   int64 // in the archive
	m     *Manifest
	info  ota.ImageInfo
	attrs map[string]json.RawMessage

	sections map[string]*section
	workers  int
	maxFrame int64
	dec      *decoder // nil until it is needed

	entries []*entry
	seen    map[string]bool // names, folded
	missing int             // files of the manifest still to come
	cur     *data           // of the part offered last
	fills   []ota.ImagePart
	ended   bool // the end of the archive was reached
	scratch [][]byte
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
			return 0, errCount
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
	return 0, io.ErrNoProgress
}

var errCount = errors.New("the source returned an impossible count")

func open(ctx context.Context, rd io.Reader, p *Policy) (*Reader, error) {
	src := &source{ctx, rd}
	r := &Reader{src: src, br: bufio.NewReaderSize(src, 4096), seen: map[string]bool{}}
	return r, r.open(p)
}

func openRanges(ctx context.Context, rd Source, p *Policy) (*Reader, error) {
	at := &cursor{src: rd, size: rd.Size()}
	src := &source{ctx, at}
	r := &Reader{src: src, at: at, br: bufio.NewReaderSize(src, window), seen: map[string]bool{}}
	at.ctx, at.block = func() context.Context { return src.ctx }, r.ahead
	if at.size < 0 {
		return nil, r.fail(nil, errCount)
	}
	if _, err := r.br.Peek(int(min(window, at.size))); err != nil {
		at.close()
		return nil, r.fail(nil, err)
	}
	err := r.open(p)
	if err != nil {
		at.close()
	}
	return r, err
}

// open reads the manifest and the index.
func (r *Reader) open(p *Policy) error {
	e, err := r.manifestEntry()
	if err != nil {
		return err
	}
	limit := int64(maxManifest)
	if p.MaxManifest > 0 {
		limit = int64(p.MaxManifest)
	}
	if e.size > limit {
		return r.fail(e, because(ErrTooLarge, "manifest of %d bytes, limit %d", e.size, limit))
	}
	raw, stored, err := r.text(e)
	if err != nil {
		return err
	}

	// The signature first: nobody else's JSON is looked at.
	var have signatures
	x, err := e.signatures()
	if err != nil {
		return r.fail(e, err)
	}
	if x != nil {
		attrs, err := parseExtra(x, &have)
		if err != nil {
			return r.fail(e, err)
		}
		r.attrs = map[string]json.RawMessage{}
		for _, a := range attrs {
			r.attrs[a.Name] = a.Value
		}
	}
	signers, err := p.verify(raw, &have)
	if err != nil {
		return r.fail(e, err)
	}
	if r.m, err = parseManifest(raw); err == nil {
		err = r.describe(p, signers)
	}
	if err != nil {
		r.err = &Error{Entry: ManifestName, Off: -1, Err: err}
		return r.err
	}
	if e.method == methodDeflate && r.m.Extra["ota"] != nil && !bytes.Equal(stored, storedBlocks(raw)) {
		return r.fail(e, because(ErrFormat, "a manifest that is deflate, but not of stored blocks"))
	}
	return r.index()
}

// text returns the content of the manifest's entry e, of limited size, and its
// stored bytes if they are others.
func (r *Reader) text(e *entry) (raw, stored []byte, err error) {
	if e.packed > maxManifest+maxManifest/8 {
		return nil, nil, r.fail(e, because(ErrTooLarge, "manifest of %d bytes", e.packed))
	}
	raw = make([]byte, e.size)
	in := &packed{r: r, end: r.off + e.packed}
	var body io.Reader = in
	if e.method == methodDeflate {
		in.all = make([]byte, 0, e.packed)
		body = newInflater(in)
	}
	_, err = io.ReadFull(body, raw)
	if z, ok := body.(*inflater); ok && err == nil {
		err = z.end()
	}
	if err != nil {
		return nil, nil, r.fail(e, in.explain(err))
	}
	return raw, in.all, r.finish(e, crc32.ChecksumIEEE(raw))
}

// index reads the entry of the index, if there is one.
func (r *Reader) index() error {
	if r.m.Index == "" {
		return nil
	}
	x := r.m.Part(r.m.Index)
	e, err := r.next()
	if err != nil {
		return err
	}
	if e == nil || e.name != x.Src {
		return r.fail(e, because(ErrIndex, "it does not come after the manifest"))
	}
	if _, err := r.lookUp(e); err != nil {
		return err
	}
	if e.method == methodDeflate && x.Storage == nil {
		return r.fail(e, because(ErrNoDigest, "its stored bytes have none"))
	}
	d, h := newData(r, e, x), sha256.New()
	r.cur = d // whose data may be read
	br := bufio.NewReader(io.TeeReader(d, h))
	r.sections, err = readIndex(br, r.m)
	if err == nil {
		if _, err = br.ReadByte(); err == io.EOF {
			err = nil
		}
	}
	r.cur = nil
	if err == nil && [32]byte(h.Sum(nil)) != *x.SHA256 {
		err = because(ErrDigest, "SHA-256 of the index")
	}
	if err != nil {
		if r.err == nil {
			_ = r.fail(e, err)
		}
		return r.err
	}
	for i := range r.info.Parts {
		if s := r.sections[r.info.Parts[i].Name]; s != nil {
			r.info.Parts[i].Chunks = s.chunks
		}
	}
	return nil
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
	r.workers, r.maxFrame = p.workers(), p.maxWindow()
	var total int64 // of at most 64 sizes of 40 bits
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
		if st := q.Storage; st != nil && max(st.Frame, st.Window) > r.maxFrame {
			return because(ErrTooLarge, "part %s: frames of %d bytes with a window of %d, limit %d", ota.Quote(q.Name), st.Frame, st.Window, r.maxFrame)
		}
		if q.Name == m.Index {
			if limit := p.maxIndex(); q.Size > limit {
				return because(ErrTooLarge, "an index of %d bytes, limit %d", q.Size, limit)
			}
			continue
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

// Downloaded implements [ota.Downloader] if what r reads does: the reader given to
// [Policy.Open], or the [Source]. Otherwise it returns 0. It may be called at any
// time.
func (r *Reader) Downloaded() int64 {
	var from any = r.src.r
	if r.at != nil {
		from = r.at.src
	}
	if d, ok := from.(ota.Downloader); ok {
		return d.Downloaded()
	}
	return 0
}

// Manifest returns the manifest. It must not be changed.
func (r *Reader) Manifest() *Manifest { return r.m }

// Attrs returns the members beside the signatures in the extra field 0x293a of
// the manifest's entry. No signature covers them. They must not be changed.
func (r *Reader) Attrs() map[string]json.RawMessage { return r.attrs }

// Next implements [ota.Image].
func (r *Reader) Next(ctx context.Context) (*ota.ImagePart, error) {
	r.src.ctx = ctx
	if r.cur != nil {
		r.leave(r.cur)
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
		d := newData(r, e, q)
		r.cur = d
		if q.NoUpdate {
			r.leave(d)
			continue
		}
		part := &ota.ImagePart{PartInfo: ota.PartInfo{Name: q.Name, Size: q.Size, SHA256: q.SHA256}, Data: d}
		if d.sec != nil {
			part.Chunks = d.sec.chunks
		}
		if r.at != nil && part.Chunks != nil && e.method == methodStored && !e.descriptor {
			part.Data = selectable{d}
		}
		return part, nil
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

// leave passes over what was not read of d.
func (r *Reader) leave(d *data) {
	if r.err == nil && (r.at == nil || d.e.descriptor) {
		_ = d.drain() // leaves its error in r.err
	}
	d.stop()
	d.err, d.left = errStale, 0
	if r.err == nil && r.at != nil {
		if d.end > r.at.size {
			_ = r.fail(d.e, ErrTruncated)
			return
		}
		r.seek(d.end)
	}
}

// Close ends what the Reader does in the background, and makes all further calls
// fail. What it reads from is not closed. It may be called more than once, and
// need not be called when Next or [Policy.Open] has returned an error, io.EOF
// included, or when the context given to Next has ended.
func (r *Reader) Close() error {
	if r.cur != nil {
		r.cur.stop()
		r.cur = nil
	}
	if r.at != nil {
		r.at.close()
	}
	if r.dec != nil {
		r.dec.z.Close()
		r.dec = nil
	}
	r.err = errClosed
	return nil
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
		size, packed, method := q.Size, e.packed, e.method
		if st := q.Storage; st != nil {
			switch st.Encoding {
			case EncodingNone:
				method = methodStored
			case EncodingDeflate:
				packed, method = st.Size, methodDeflate
			case EncodingZstd:
				size, packed, method = st.Size, st.Size, methodStored
			}
		}
		switch {
		case size != e.size:
			return nil, r.fail(e, because(ErrSize, "%d instead of %d", e.size, size))
		case packed != e.packed, packed > size+size/8+1<<10: // a lot of nothing
			return nil, r.fail(e, because(ErrSize, "%d instead of %d", e.packed, packed))
		case method != e.method:
			return nil, r.fail(e, because(ErrMismatch, "method %d instead of %d", e.method, method))
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
		b, err := r.br.Peek(lenDescriptor)
		if err != nil && !errors.Is(err, io.EOF) {
			return r.fail(e, err)
		}
		n, err := checkDescriptor(b, crc, e)
		if err != nil {
			if len(b) < lenDescriptor {
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
	r.stop()
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

// stop ends what a failed Reader does no more.
func (r *Reader) stop() {
	if r.cur != nil {
		r.cur.stop()
	}
	if r.at != nil {
		r.at.close()
	}
}

// packed yields the stored bytes of an entry.
type packed struct {
	r   *Reader
	end int64     // offset of what comes after them
	crc uint32    // of what was read
	sum hash.Hash // the same, or nil
	all []byte    // the same, if not nil
	err error     // of the source
}

// Read implements io.Reader.
func (in *packed) Read(p []byte) (int, error) {
	if in.err != nil {
		return 0, in.err
	}
	r := in.r
	left := in.end - r.off
	if left <= 0 {
		return 0, io.EOF
	}
	n, err := r.br.Read(p[:min(int64(len(p)), left)])
	r.off += int64(n)
	in.crc = crc32.Update(in.crc, crc32.IEEETable, p[:n])
	if in.sum != nil {
		in.sum.Write(p[:n])
	}
	if in.all != nil {
		in.all = append(in.all, p[:n]...)
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	in.err = err
	return n, err
}

// explain returns why err came of decoding in.
func (in *packed) explain(err error) error {
	switch {
	case errors.Is(err, ErrDigest), errors.Is(err, ErrCorrupt): // found in what was read before
		return err
	case in.err != nil:
		return in.err
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return because(ErrCorrupt, "they end too early")
	}
	return err
}

// inflater decodes deflate, RFC 1951.
type inflater struct {
	z  io.Reader
	br *bufio.Reader
}

func newInflater(in *packed) *inflater {
	br := bufio.NewReader(in)
	return &inflater{flate.NewReader(br), br}
}

// Read implements io.Reader.
func (i *inflater) Read(p []byte) (int, error) {
	n, err := i.z.Read(p)
	if e := flate.CorruptInputError(0); errors.As(err, &e) {
		err = because(ErrCorrupt, "%w", err)
	}
	return n, err
}

// end returns nil if there is nothing more, neither decoded nor stored.
func (i *inflater) end() error {
	n, err := 0, error(nil)
	for range 100 {
		if n, err = i.Read(make([]byte, 1)); n > 0 || err != nil {
			break
		}
	}
	switch {
	case n > 0:
		return because(ErrCorrupt, "there is more than its size")
	case err != io.EOF:
		return err
	}
	if _, err = i.br.ReadByte(); err == nil {
		return because(ErrCorrupt, "there is something after the compressed data")
	}
	if err == io.EOF {
		err = nil
	}
	return err
}

// data is the content of an entry, read by the caller or drained by Next.
type data struct {
	r          *Reader
	e          *entry
	q          *Part
	sec        *section
	start, end int64     // offsets of what is stored
	left       int64     // bytes of the content still to be yielded
	body       io.Reader // yields them; nil until the first Read
	in         packed    // what body reads
	some       bool      // only wanted is to be yielded
	wanted     []ota.Range
	thorough   bool      // the caller sees nothing of it, and checks nothing
	crc        uint32    // of the content
	sha1       hash.Hash // nil if it is not to be checked
	err        error     // once nothing is left
}

func newData(r *Reader, e *entry, q *Part) *data {
	return &data{r: r, e: e, q: q, sec: r.sections[q.Name], left: q.Size,
		start: r.off, end: r.off + e.packed, in: packed{r: r, end: r.off + e.packed}}
}

// begin prepares the first Read.
func (d *data) begin() error {
	if d.q.SHA1 != nil && !d.some && (d.thorough || d.r.info.Unsigned) {
		d.sha1 = sha1.New()
	}
	switch {
	case d.q.Storage != nil && d.q.Storage.Encoding == EncodingZstd:
		f, err := newFrames(d, d.r.workers)
		if err != nil {
			return err
		}
		f.expect()
		d.body = f
		return nil
	case d.some:
		p := &picked{d, d.wanted}
		p.expect()
		d.body = p
		return nil
	case d.e.method == methodDeflate:
		if d.q.Storage != nil {
			d.in.sum = sha256.New()
		}
		d.body = newInflater(&d.in)
	default:
		d.body = &d.in
	}
	d.expect([]ota.Range{{Off: d.start, Len: d.end - d.start}})
	return nil
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
	if d.body == nil {
		if err := d.begin(); err != nil {
			return 0, d.r.fail(d.e, err)
		}
	}
	n, err := d.body.Read(p[:min(int64(len(p)), d.left)])
	d.left -= int64(n)
	if d.e.method == methodDeflate {
		d.crc = crc32.Update(d.crc, crc32.IEEETable, p[:n])
	}
	if d.sha1 != nil {
		d.sha1.Write(p[:n])
	}
	if d.left > 0 {
		if err != nil {
			err = d.r.fail(d.e, d.in.explain(err))
		}
		return n, err
	}
	d.err = io.EOF
	if err := d.finish(); err != nil {
		d.err = err
		return n, err
	}
	return n, nil
}

// finish checks what can be when all was read.
func (d *data) finish() error {
	if d.some {
		d.stop()
		return nil
	}
	crc := d.in.crc
	if z, ok := d.body.(*inflater); ok {
		if err := z.end(); err != nil {
			return d.r.fail(d.e, d.in.explain(err))
		}
		crc = d.crc
	}
	if err := d.r.finish(d.e, crc); err != nil {
		return err
	}
	d.end = d.r.off // behind the data descriptor
	what := ""
	switch st := d.q.Storage; {
	case d.sha1 != nil && !bytes.Equal(d.sha1.Sum(nil), d.q.SHA1[:]):
		what = "SHA-1"
	case d.in.sum != nil && !bytes.Equal(d.in.sum.Sum(nil), st.SHA256[:]):
		what = "SHA-256 of the stored bytes"
	default:
		return nil
	}
	return d.r.fail(d.e, because(ErrDigest, "%s of part %s", what, ota.Quote(d.q.Name)))
}

// drain reads the rest, and checks all there is to check if it is everything.
func (d *data) drain() error {
	if d.left == 0 {
		return nil
	}
	var c *checker
	if d.body == nil && d.q.SHA256 != nil {
		d.thorough = true
		c = &checker{whole: sha256.New()}
		if st := d.q.Storage; st != nil && st.Encoding == EncodingZstd {
			d.in.sum = sha256.New()
		}
		if d.sec != nil && d.sec.chunks != nil {
			c.chunk, c.chunks = sha256.New(), d.sec.chunks
		}
	}
	if err := d.pour(c); err != nil || c == nil {
		return err
	}
	if [32]byte(c.whole.Sum(nil)) != *d.q.SHA256 {
		return d.r.fail(d.e, because(ErrDigest, "SHA-256 of part %s", ota.Quote(d.q.Name)))
	}
	if c.n > 0 {
		c.end()
	}
	if c.bad > 0 {
		return d.r.fail(d.e, because(ErrDigest, "SHA-256 of chunk %d of part %s", c.bad-1, ota.Quote(d.q.Name)))
	}
	return nil
}

// pour reads the rest into c, if not nil: while it reads, if it may.
func (d *data) pour(c *checker) error {
	r := d.r
	for len(r.scratch) < 3 {
		r.scratch = append(r.scratch, make([]byte, 64<<10))
		if r.workers == 1 {
			break
		}
	}
	if c == nil || r.workers == 1 {
		for d.left > 0 {
			n, err := d.Read(r.scratch[0])
			if err != nil {
				return err
			}
			c.write(r.scratch[0][:n])
		}
		return nil
	}
	free, full := make(chan []byte, len(r.scratch)), make(chan []byte, len(r.scratch))
	for _, b := range r.scratch {
		free <- b
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(full)
	wg.Go(func() {
		for b := range full {
			c.write(b)
			free <- b[:cap(b)]
		}
	})
	for d.left > 0 {
		b := <-free
		n, err := d.Read(b)
		if err != nil {
			return err
		}
		full <- b[:n]
	}
	return nil
}

// checker compares the content of a part with its digests.
type checker struct {
	whole  hash.Hash
	chunk  hash.Hash
	chunks *ota.Chunks // nil if there are none
	next   int         // chunk that is being read
	n      int64       // bytes of it
	bad    int         // the first that is wrong, plus 1
}

// write adds p.
func (c *checker) write(p []byte) {
	if c == nil {
		return
	}
	c.whole.Write(p)
	for c.chunks != nil && len(p) > 0 {
		k := min(int64(len(p)), c.chunks.Size-c.n)
		c.chunk.Write(p[:k])
		p = p[k:]
		if c.n += k; c.n == c.chunks.Size {
			c.end()
		}
	}
}

// end ends a chunk.
func (c *checker) end() {
	if c.bad == 0 && [32]byte(c.chunk.Sum(nil)) != c.chunks.SHA256[c.next] {
		c.bad = c.next + 1
	}
	c.chunk.Reset()
	c.next, c.n = c.next+1, 0
}

// stop ends goroutines, if there are any.
func (d *data) stop() {
	if f, ok := d.body.(*frames); ok {
		f.stop()
	}
}

// decoder returns the decoder of zstd, which it makes if there is none yet.
func (r *Reader) decoder() (*decoder, error) {
	if r.dec == nil {
		z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(max(r.workers, 1)), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(uint64(max(r.maxFrame, 1<<10))), zstd.WithDecoderMaxMemory(uint64(r.maxFrame)))
		if err != nil {
			return nil, err
		}
		r.dec = &decoder{z: z}
	}
	return r.dec, nil
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
