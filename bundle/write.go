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
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash"
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

	// Pack says by name which parts are not to be stored as they are, or are
	// to have chunks.
	Pack map[string]Packing
	// Scratch, if not nil, is used from its beginning to keep compressed parts
	// until the manifest can be written, such as a temporary *os.File. Without
	// it such parts are compressed twice.
	Scratch Scratch
	// Workers is how many frames are compressed at the same time; 0 means
	// GOMAXPROCS, but at most 8. What is written does not depend on it. Each
	// takes the memory of an encoder (2 MiB at level 3, 4 MiB at level 7, 40 MiB at
	// level 10 and above, and more for windows above 4 MiB) and twice the frame.
	Workers int
}

// Scratch is a place for data that are not needed for long.
type Scratch interface {
	io.ReaderAt
	io.WriterAt
}

// The part that holds the index, as [Write] names it.
const (
	IndexPart = "ota-index"
	indexFile = "ota.index"
)

// Write writes the bundle that m describes to w: the manifest, the index if
// there is one, then the files of the parts, in their order. files maps Src of
// every part that has one to its content. Size, SHA1, SHA256 and Storage of
// these parts are computed, or copied if the file is a [*Stored], and so is the
// part of the index; those in m are neither used nor changed. Fill parts are
// written without digests.
//
// The result depends on the arguments alone, and is laid out as by mos
// create-fw-bundle (mongoose-os/mos, common/ourzip): sizes in the local headers,
// no times and attributes, everything stored. If a part is compressed then so is
// the manifest, as by its option --compress: devices of Mongoose OS then refuse
// the bundle at its first byte. What [Policy.Open] or genuine devices would
// refuse otherwise is an error of type [*Error] before anything is written. A
// file that changed between its two readings is one that wraps
// [ota.ErrChanged].
func Write(ctx context.Context, w io.Writer, m *Manifest, files map[string]File, o *WriteOptions) error {
	if o == nil {
		o = &WriteOptions{}
	}
	b := &writer{ctx: ctx, w: w, dir: o.Dir, workers: defaultWorkers(o.Workers), scratch: o.Scratch}
	if o.Dir != "" {
		b.dir += "/"
		if !plain(o.Dir, maxDir) {
			return &Error{Entry: b.dir, Off: -1, Err: ErrName}
		}
	}
	m, err := b.measure(m, files, o.Pack)
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

	first := item{data: text, entry: entry{name: ManifestName, extra: extra, crc: crc32.ChecksumIEEE(text), size: int64(len(text))}}
	if b.compressed {
		first.method, first.data = methodDeflate, storedBlocks(text)
	}
	first.packed = int64(len(first.data))
	b.items = slices.Insert(b.items, 0, first)
	if err := b.layOut(); err != nil {
		return err
	}
	for i := range b.items {
		e := &b.items[i]
		if err := b.write(e.raw); err != nil {
			return err
		}
		if err := b.content(e); err != nil {
			return err
		}
	}
	return b.write(b.directory())
}

// writer is the state of one Write.
type writer struct {
	ctx        context.Context
	w          io.Writer
	dir        string
	workers    int
	scratch    Scratch
	kept       int64 // bytes in scratch
	items      []item
	compressed bool  // one of them is
	end        int64 // offset of the directory
}

// item is an entry to be written.
type item struct {
	entry
	data    []byte // what is stored, if not nil
	file    File
	stored  *Stored // if file is one
	sums    sums
	packing Packing
	storage *Storage // nil if file is stored as it is
	kept    int64    // where it is in scratch, or -1
}

// measure returns m with the sizes and digests of files.
func (b *writer) measure(m *Manifest, files map[string]File, pack map[string]Packing) (*Manifest, error) {
	c := *m
	c.Parts, c.Index = slices.Clone(m.Parts), ""
	if m.Index != "" {
		c.Parts = slices.DeleteFunc(c.Parts, func(p Part) bool { return p.Name == m.Index })
	}
	for name, k := range pack {
		p := c.Part(name)
		if p == nil || p.Src == "" {
			return nil, &Error{Off: -1, Err: because(ErrManifest, "there is no part %s to be packed", ota.Quote(name))}
		}
		if err := k.check(); err != nil {
			return nil, &Error{Entry: p.Src, Off: -1, Err: err}
		}
	}
	used := map[string]bool{}
	for i := range c.Parts {
		p := &c.Parts[i]
		if p.SHA1, p.SHA256, p.Storage = nil, nil, nil; p.Src == "" {
			continue
		}
		f := files[p.Src]
		if f == nil {
			return nil, &Error{Entry: p.Src, Off: -1, Err: ErrMissing}
		}
		used[p.Src] = true
		if st, ok := f.(*Stored); ok {
			if _, ok := pack[p.Name]; ok {
				return nil, &Error{Entry: p.Src, Off: -1, Err: because(ErrManifest, "part %s is stored already", ota.Quote(p.Name))}
			}
			b.items = append(b.items, st.item(p))
			b.compressed = b.compressed || st.compressed()
			continue
		}
		e := item{entry: entry{name: p.Src}, file: f, packing: pack[p.Name], storage: pack[p.Name].storage(f.Size()), kept: -1}
		if err := b.measureOne(p, &e); err != nil {
			return nil, err
		}
		b.items = append(b.items, e)
	}
	for name := range files {
		if !used[name] {
			return nil, &Error{Entry: name, Off: -1, Err: ErrExtraEntry}
		}
	}
	return &c, b.index(&c)
}

// measureOne reads the file of p and fills in p and e.
func (b *writer) measureOne(p *Part, e *item) (err error) {
	p.Size = e.file.Size()
	if p.Size > maxFileSize && (e.storage == nil || e.storage.Encoding != EncodingZstd) || p.Size > maxZstdSize {
		return &Error{Entry: p.Src, Off: -1, Err: ErrTooLarge}
	}
	if e.storage != nil && p.Size > 0 { // what the manifest will say, before the work
		q := *p
		q.SHA256 = new([32]byte)
		s := *e.storage
		s.Size = 1
		if err := s.check(&q); err != nil {
			return &Error{Entry: p.Src, Off: -1, Err: err}
		}
	}
	w := io.Discard
	if e.storage != nil && e.storage.Encoding != EncodingNone && b.scratch != nil {
		e.kept = b.kept
		w = &at{b.scratch, b.kept}
	}
	if e.sums, err = b.pass(w, e); err != nil {
		return err
	}
	if e.kept >= 0 {
		b.kept += e.sums.stored
	}
	p.SHA256 = &e.sums.sha256
	e.crc, e.packed, e.size = e.sums.crc, e.sums.stored, p.Size
	switch s := e.storage; {
	case s == nil || s.Encoding == EncodingNone:
		p.SHA1 = &e.sums.sha1
	case s.Encoding == EncodingDeflate:
		p.SHA1 = &e.sums.sha1
		e.method, b.compressed = methodDeflate, true
	default:
		e.size, b.compressed = e.packed, true
	}
	if e.packed > maxFileSize {
		return &Error{Entry: p.Src, Off: -1, Err: because(ErrTooLarge, "%d bytes, compressed", e.packed)}
	}
	if s := e.storage; s != nil {
		if s.Encoding != EncodingNone {
			s.Size, s.SHA256 = e.packed, e.sums.digest
		}
		if s.indexed() {
			s.Section = sha256.Sum256(e.sums.sec.bytes())
		}
		p.Storage = s
	}
	return nil
}

// index adds the index to m and to what is to be written, if there must be one.
func (b *writer) index(m *Manifest) error {
	parts := m.indexed()
	if len(parts) == 0 {
		return nil
	}
	data := indexHeader(len(parts))
	for _, p := range parts {
		i := slices.IndexFunc(b.items, func(e item) bool { return e.name == p.Src })
		data = append(data, b.items[i].sums.sec.bytes()...)
		b.items[i].sums.sec = section{}
	}
	if len(data) > maxIndex {
		return &Error{Entry: indexFile, Off: -1, Err: because(ErrTooLarge, "%d bytes of digests", len(data))}
	}
	h1, h256 := sha1.Sum(data), sha256.Sum256(data)
	m.Index = IndexPart
	n := int64(len(data))
	p := Part{Name: IndexPart, Src: indexFile, Size: n, SHA1: &h1, SHA256: &h256, NoUpdate: true}
	e := item{data: data, entry: entry{name: indexFile, crc: crc32.ChecksumIEEE(data), size: n}}
	if b.compressed {
		if z := deflated(data); len(z) < len(data) { // digests of equal chunks
			e.data, e.method = z, methodDeflate
			p.Storage = &Storage{Encoding: EncodingDeflate, Size: int64(len(z)), SHA256: sha256.Sum256(z)}
		}
	}
	m.Parts = append(m.Parts, p)
	e.packed = int64(len(e.data))
	b.items = slices.Insert(b.items, 0, e)
	return nil
}

// pass reads the file of e and writes to w what is to be stored.
func (b *writer) pass(w io.Writer, e *item) (sums, error) {
	st := e.storage
	if st == nil {
		st = &Storage{}
	}
	return b.encode(w, e.file, st, e.packing, e.name)
}

// content writes what e stores.
func (b *writer) content(e *item) error {
	if e.data != nil {
		return b.write(e.data)
	}
	if e.stored != nil {
		want := e.stored.digest()
		return b.copied(e, e.stored, 0, sha256.New(), want[:])
	}
	if e.kept < 0 {
		s, err := b.pass(b.w, e)
		if err == nil && (s.digest != e.sums.digest || s.stored != e.packed || s.sha256 != e.sums.sha256) {
			err = &Error{Entry: e.name, Off: -1, Err: ota.ErrChanged}
		}
		return err
	}
	return b.copied(e, b.scratch, e.kept, crc32.NewIEEE(), binary.BigEndian.AppendUint32(nil, e.sums.kept))
}

// copied writes what e stores, which is at off in from and has the checksum sum.
func (b *writer) copied(e *item, from io.ReaderAt, off int64, h hash.Hash, sum []byte) error {
	src := &source{ctx: b.ctx, r: io.NewSectionReader(from, off, e.packed)}
	n, err := io.CopyBuffer(io.MultiWriter(b.w, h), src, make([]byte, 256<<10))
	if err == nil && (n != e.packed || !bytes.Equal(h.Sum(nil), sum)) {
		err = ota.ErrChanged
	}
	if err != nil {
		return &Error{Entry: e.name, Off: -1, Err: err}
	}
	return nil
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
	for i := range b.items {
		e := &b.items[i]
		name := b.dir + e.name
		h := le.AppendUint32(nil, sigLocal)
		h = le.AppendUint16(h, 20) // version needed
		h = le.AppendUint16(h, 0)  // flags
		h = le.AppendUint16(h, e.method)
		h = le.AppendUint32(h, 0) // time and date
		h = le.AppendUint32(h, e.crc)
		h = le.AppendUint32(h, uint32(e.packed))
		h = le.AppendUint32(h, uint32(e.size))
		h = le.AppendUint16(h, uint16(len(name)))
		h = le.AppendUint16(h, uint16(len(e.extra)))
		h = append(h, name...)
		e.raw, e.off = append(h, e.extra...), b.end
		if lenCentral-lenLocal+len(e.raw) > maxCentral {
			return &Error{Entry: e.name, Off: -1, Err: ErrHeaderTooLong}
		}
		b.end += int64(len(e.raw)) + e.packed
	}
	if b.end > math.MaxUint32-MaxParts*maxCentral {
		return &Error{Off: -1, Err: ErrTooLarge}
	}
	return nil
}

// directory returns the directory and the end record.
func (b *writer) directory() []byte {
	var d []byte
	for _, e := range b.items {
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
	d = le.AppendUint16(d, uint16(len(b.items)))
	d = le.AppendUint16(d, uint16(len(b.items)))
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
