package bundle_test

import (
	"archive/zip"
	"bytes"
	"compress/flate"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"

	"github.com/klauspost/compress/zstd"
	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

// crafted makes a bundle with one part that is stored as zstd, of frames that
// need not be right.
type crafted struct {
	frames              []string
	size, window, frame int64
	chunk               int64 // 0: none
	content             string
	change              func(index []byte) []byte // before it is signed for
}

func (c *crafted) bytes() []byte {
	stored := strings.Join(c.frames, "")
	index := []byte("OTAINDEX\x01\x00\x00\x00\x01\x00\x00\x00")
	for _, f := range c.frames {
		index = le.AppendUint32(index, uint32(len(f)))
		sum := sha256.Sum256([]byte(f))
		index = append(index, sum[:]...)
	}
	if c.chunk > 0 {
		for off := int64(0); off < c.size; off += c.chunk {
			var piece string
			if off < int64(len(c.content)) {
				piece = c.content[off:min(off+c.chunk, int64(len(c.content)))]
			}
			sum := sha256.Sum256([]byte(piece))
			index = append(index, sum[:]...)
		}
	}
	if c.change != nil {
		index = c.change(index)
	}
	chunk := ""
	if c.chunk > 0 {
		chunk = fmt.Sprintf(`"chunk":%d,`, c.chunk)
	}
	section := index[min(16, len(index)):]
	manifest := fmt.Sprintf(`{"parts":{"a":{"src":"a.bin","size":%d,"cs_sha256":%q},"ota-index":{"src":"ota.index","size":%d,"cs_sha256":%q,"update":false}},`+
		`"ota":{"format":1,"index":"ota-index","parts":{"a":{"encoding":"zstd","stored_size":%d,"stored_sha256":%q,"window":%d,"frame":%d,%s"section_sha256":%q}}}}`,
		c.size, sum256(c.content), len(index), sum256(string(index)), len(stored), sum256(stored), c.window, c.frame, chunk, sum256(string(section)))
	return (&archive{entries: []entry{
		{name: "manifest.json", data: manifest}, {name: "ota.index", data: string(index)}, {name: "a.bin", data: stored},
	}}).bytes()
}

// frame compresses s.
func frame(t testing.TB, s string, o ...zstd.EOption) string {
	z, err := zstd.NewWriter(nil, append([]zstd.EOption{zstd.WithEncoderConcurrency(1), zstd.WithSingleSegment(true)}, o...)...)
	require.NoError(t, err)
	return string(z.EncodeAll([]byte(s), nil))
}

// everyWay opens a bundle as a stream and with ranges, with one worker and with more,
// and returns the errors of reading it, which must be of the same kind.
func everyWay(t testing.TB, p bundle.Policy, file []byte) error {
	t.Helper()
	alone := p.Workers == 1
	var first error
	for i, workers := range []int{1, 3} {
		if alone && workers != 1 { // goroutines make coverage random, which keeps fuzzing busy
			break
		}
		p.Workers = workers
		b, err := p.Open(t.Context(), bytes.NewReader(file))
		if err == nil {
			_, err = contentOf(t.Context(), b, 1000, nil)
			if err == nil {
				_, err = p.Verify(t.Context(), bytes.NewReader(file))
			} else {
				_, verr := p.Verify(t.Context(), bytes.NewReader(file))
				require.Error(t, verr)
			}
		}
		if i == 0 {
			first = err
		}
		r, rerr := p.OpenRanges(t.Context(), source(file))
		if rerr == nil {
			_, rerr = contentOf(t.Context(), r, 1000, nil)
		}
		for _, e := range []error{err, rerr} {
			require.Equal(t, first == nil, e == nil, "%v and %v", first, e)
		}
	}
	return first
}

func TestFramesRefused(t *testing.T) {
	const size = 1024
	data := string(text(size, 1))
	good := func() *crafted {
		return &crafted{frames: []string{frame(t, data)}, size: size, window: 1024, frame: 1024, content: data}
	}
	require.NoError(t, everyWay(t, *lax, good().bytes()))
	zeros := func(n int) string { return strings.Repeat("\x00", n) }
	skippable := "\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
	raw := func(header, content string, last int) string { // one raw block
		n := len(content)<<3 | last
		return "\x28\xb5\x2f\xfd" + header + string([]byte{byte(n), byte(n >> 8), byte(n >> 16)}) + content
	}
	header := func(size int) string { return "\x60" + string(le.AppendUint16(nil, uint16(size-256))) } // single segment
	require.NoError(t, everyWay(t, *lax, (&crafted{frames: []string{raw(header(size), data, 1)}, size: size, window: 1024, frame: 1024, content: data}).bytes()))
	rle := func(n int) string { // one block of n zeros
		h := n<<3 | 1<<1 | 1
		return string([]byte{byte(h), byte(h >> 8), byte(h >> 16), 0})
	}

	for name, c := range map[string]struct {
		do   func(c *crafted)
		err  error
		text string
	}{
		"a bomb that says so":                  {func(c *crafted) { c.frames[0] = frame(t, zeros(1<<20)) }, bundle.ErrCorrupt, "1048576"},
		"a bomb that says it is small":         {func(c *crafted) { c.frames[0] = "\x28\xb5\x2f\xfd" + header(size) + rle(100000) }, bundle.ErrCorrupt, ""},
		"less than it says":                    {func(c *crafted) { c.frames[0] = "\x28\xb5\x2f\xfd" + header(size) + rle(1000) }, bundle.ErrCorrupt, ""},
		"content of another size":              {func(c *crafted) { c.frames[0] = frame(t, data[1:]) }, bundle.ErrCorrupt, "1023 bytes"},
		"no size":                              {func(c *crafted) { c.frames[0] = raw("\x00\x00", data, 1) }, bundle.ErrCorrupt, "does not say its size"},
		"dictionary":                           {func(c *crafted) { c.frames[0] = raw("\x61\x07"+header(size)[1:], data, 1) }, bundle.ErrCorrupt, "dictionary 7"},
		"reserved bit":                         {func(c *crafted) { c.frames[0] = raw("\x68"+header(size)[1:], data, 1) }, bundle.ErrCorrupt, ""},
		"window":                               {func(c *crafted) { c.frames[0] = raw("\x40\x08"+header(size)[1:], data, 1) }, bundle.ErrCorrupt, "window of 2048"},
		"window of 3 TiB":                      {func(c *crafted) { c.frames[0] = raw("\x40\xff"+header(size)[1:], data, 1) }, bundle.ErrCorrupt, "window"},
		"skippable":                            {func(c *crafted) { c.frames[0] = skippable }, bundle.ErrCorrupt, "skippable"},
		"skippable before":                     {func(c *crafted) { c.frames[0] = skippable + c.frames[0] }, bundle.ErrCorrupt, "skippable"},
		"skippable after":                      {func(c *crafted) { c.frames[0] += skippable }, bundle.ErrCorrupt, "12 bytes after"},
		"empty frame after":                    {func(c *crafted) { c.frames[0] += "\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00" }, bundle.ErrCorrupt, "9 bytes after"},
		"garbage after":                        {func(c *crafted) { c.frames[0] += "x" }, bundle.ErrCorrupt, "1 bytes after"},
		"two frames in one":                    {func(c *crafted) { c.frames[0] = frame(t, data[:512]) + frame(t, data[512:]) }, bundle.ErrCorrupt, ""},
		"no frame":                             {func(c *crafted) { c.frames[0] = "garbage!" }, bundle.ErrCorrupt, "magic"},
		"legacy magic":                         {func(c *crafted) { c.frames[0] = "\x27" + c.frames[0][1:] }, bundle.ErrCorrupt, ""},
		"cut":                                  {func(c *crafted) { c.frames[0] = c.frames[0][:len(c.frames[0])-1] }, bundle.ErrCorrupt, "cut"},
		"cut in the header":                    {func(c *crafted) { c.frames[0] = c.frames[0][:5] }, bundle.ErrCorrupt, ""},
		"cut before the block":                 {func(c *crafted) { c.frames[0] = "\x28\xb5\x2f\xfd" + header(size) }, bundle.ErrCorrupt, "cut"},
		"no last block":                        {func(c *crafted) { c.frames[0] = raw(header(size), data, 0) }, bundle.ErrCorrupt, "cut"},
		"reserved block":                       {func(c *crafted) { c.frames[0] = "\x28\xb5\x2f\xfd" + header(size) + "\x07\x00\x00" }, bundle.ErrCorrupt, ""},
		"checksum that is not there":           {func(c *crafted) { c.frames[0] = raw("\x64"+header(size)[1:], data, 1) }, bundle.ErrCorrupt, "cut"},
		"wrong checksum":                       {func(c *crafted) { c.frames[0] = raw("\x64"+header(size)[1:], data, 1) + "abcd" }, bundle.ErrCorrupt, ""},
		"other content":                        {func(c *crafted) { c.frames[0] = frame(t, string(text(size, 2))) }, bundle.ErrDigest, ""},
		"frame of the policy's limit and more": {func(c *crafted) { c.frame = 16 << 20 }, bundle.ErrTooLarge, "limit"},
	} {
		c1 := good()
		c.do(c1)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		file := c1.bytes()
		err := everyWay(t, *lax, file)
		runtime.ReadMemStats(&after)
		if c.err == bundle.ErrDigest {
			require.ErrorIs(t, err, ota.ErrDigest, name)
		} else {
			require.ErrorIs(t, err, c.err, name)
			require.ErrorContains(t, err, c.text, name)
		}
		require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(64<<20), name) // of 6 readings and the making
	}

	// The window counts for the policy, too.
	c := good()
	c.frame, c.window = 1<<20, 1<<20
	c.frames[0] = frame(t, data)
	require.NoError(t, everyWay(t, *lax, c.bytes()))
	p := *lax
	p.MaxWindow = 1<<20 - 1
	require.ErrorIs(t, everyWay(t, p, c.bytes()), bundle.ErrTooLarge)
	p.MaxWindow, p.MaxIndex = 1<<20, 51
	require.ErrorIs(t, everyWay(t, p, c.bytes()), bundle.ErrTooLarge)
	p.MaxIndex = 52
	require.NoError(t, everyWay(t, p, c.bytes()))

	// A part of the first frame's content beyond its window.
	c = good()
	c.size, c.frame, c.window = 4096, 4096, 1024
	c.content = string(text(1000, 7))
	c.content += string(text(2096, 8)) + c.content
	c.frames[0] = frame(t, c.content)
	require.ErrorIs(t, everyWay(t, *lax, c.bytes()), bundle.ErrCorrupt)
	c.frames[0] = frame(t, c.content, zstd.WithWindowSize(1024), zstd.WithSingleSegment(false))
	require.NoError(t, everyWay(t, *lax, c.bytes()))
}

func TestIndexRefused(t *testing.T) {
	data := string(text(2500, 1))
	good := func() *crafted {
		return &crafted{frames: []string{frame(t, data[:1024]), frame(t, data[1024:2048]), frame(t, data[2048:])}, size: 2500, window: 1024, frame: 1024, chunk: 512, content: data}
	}
	require.NoError(t, everyWay(t, *lax, good().bytes()))
	size := func(k int) int { return 16 + 36*k }
	for name, c := range map[string]struct {
		do  func(b []byte) []byte
		err error
	}{
		"magic":                       {func(b []byte) []byte { b[0] = 'o'; return b }, bundle.ErrIndex},
		"version 0":                   {func(b []byte) []byte { b[8] = 0; return b }, bundle.ErrUnsupported},
		"version 2":                   {func(b []byte) []byte { b[8] = 2; return b }, bundle.ErrUnsupported},
		"no sections":                 {func(b []byte) []byte { b[12] = 0; return b }, bundle.ErrIndex},
		"two sections":                {func(b []byte) []byte { b[12] = 2; return b }, bundle.ErrIndex},
		"many sections":               {func(b []byte) []byte { put32(12, math.MaxUint32)(b); return b }, bundle.ErrIndex},
		"empty frame":                 {func(b []byte) []byte { put32(size(1), 0)(b); return b }, bundle.ErrIndex},
		"frame of 4 GiB":              {func(b []byte) []byte { put32(size(1), math.MaxUint32)(b); return b }, bundle.ErrIndex},
		"frame of a byte more":        {func(b []byte) []byte { b[size(1)]++; return b }, bundle.ErrIndex},
		"frame of a byte less":        {func(b []byte) []byte { b[size(1)]--; return b }, bundle.ErrIndex},
		"frames that overlap":         {func(b []byte) []byte { b[size(1)]++; b[size(2)]--; return b }, bundle.ErrDigest},
		"frames exchanged":            {func(b []byte) []byte { return slices.Concat(b[:16], b[52:88], b[16:52], b[88:]) }, bundle.ErrDigest},
		"digest of a frame":           {func(b []byte) []byte { b[size(1)+4] ^= 1; return b }, bundle.ErrDigest},
		"digest of a chunk":           {func(b []byte) []byte { b[size(3)] ^= 1; return b }, bundle.ErrDigest},
		"digest of the last chunk":    {func(b []byte) []byte { b[len(b)-1] ^= 0x80; return b }, bundle.ErrDigest},
		"byte less":                   {func(b []byte) []byte { return b[:len(b)-1] }, bundle.ErrIndex},
		"byte more":                   {func(b []byte) []byte { return append(b, 0) }, bundle.ErrIndex},
		"chunk less":                  {func(b []byte) []byte { return b[:len(b)-32] }, bundle.ErrIndex},
		"header only":                 {func(b []byte) []byte { return b[:16] }, bundle.ErrIndex},
		"a byte":                      {func(b []byte) []byte { return b[:1] }, bundle.ErrIndex},
		"larger than any frame there": {func(b []byte) []byte { put32(size(1), 1024+3*2+18+4+1)(b); return b }, bundle.ErrIndex},
	} {
		c1 := good()
		c1.change = c.do
		err := everyWay(t, *lax, c1.bytes())
		if c.err == bundle.ErrDigest {
			c.err = ota.ErrDigest
		}
		require.ErrorIs(t, err, c.err, name)
	}
	// Not where it belongs, and not what the manifest says.
	a := &archive{}
	file := good().bytes()
	for off := 0; le.Uint32(file[off:]) == 0x04034b50; {
		n, size := int(le.Uint16(file[off+26:])), int(le.Uint32(file[off+18:]))
		a.entries = append(a.entries, entry{name: string(file[off+30 : off+30+n]), data: string(file[off+30+n : off+30+n+size])})
		off += 30 + n + size
	}
	require.Equal(t, file, a.bytes())
	b := *a
	b.entries = []entry{a.entries[0], a.entries[2], a.entries[1]}
	require.ErrorIs(t, everyWay(t, *lax, b.bytes()), bundle.ErrIndex, "it comes second")
	b.entries = []entry{a.entries[0], a.entries[2]}
	require.ErrorIs(t, everyWay(t, *lax, b.bytes()), bundle.ErrIndex, "it is not there")
	b.entries = a.entries[:1]
	require.ErrorIs(t, everyWay(t, *lax, b.bytes()), bundle.ErrMissing, "nothing is there")
	b.entries = a.entries[:2]
	require.ErrorIs(t, everyWay(t, *lax, b.bytes()), bundle.ErrMissing, "the part is not there")
	b.entries = []entry{a.entries[0], a.entries[1], a.entries[1], a.entries[2]}
	require.ErrorIs(t, everyWay(t, *lax, b.bytes()), bundle.ErrDuplicate, "it comes twice")
	b.entries = slices.Clone(a.entries)
	b.entries[1].data = strings.Replace(b.entries[1].data, "OTAINDEX", "OTAINDEY", 1)
	require.ErrorIs(t, everyWay(t, *lax, b.bytes()), bundle.ErrIndex)
	b.entries[1].data = a.entries[1].data[:100] + "\x00" + a.entries[1].data[101:]
	require.ErrorIs(t, everyWay(t, *lax, b.bytes()), ota.ErrDigest)
	b.entries[1].data = a.entries[1].data
	b.entries[1].flags, b.entries[1].descriptor = 8, descriptorOf(a.entries[1].data, true)
	require.NoError(t, everyWay(t, *lax, b.bytes()))
	b.entries[2].flags, b.entries[2].descriptor = 8, descriptorOf(a.entries[2].data, false)
	require.NoError(t, everyWay(t, *lax, b.bytes()))
}

// Whatever byte of a signed bundle is changed, it is refused with a typed error.
func TestEveryByte(t *testing.T) {
	k := newKey(t)
	file, _ := mixed(t, 512, 512, 600, &bundle.WriteOptions{Keys: []crypto.Signer{k}})
	p := &bundle.Policy{Keys: []*ecdsa.PublicKey{&k.PublicKey}, Workers: 1}
	for i := range file {
		if testing.Short() && i%7 != 0 {
			continue
		}
		for _, flip := range []byte{1 << (i % 8), 0x80, 0xff} {
			bad := bytes.Clone(file)
			bad[i] ^= flip
			for _, ranges := range []bool{false, true} {
				var b *bundle.Reader
				var err error
				if ranges {
					b, err = p.OpenRanges(t.Context(), source(bad))
				} else {
					b, err = p.Open(t.Context(), bytes.NewReader(bad))
				}
				if err == nil {
					_, err = contentOf(t.Context(), b, 512, nil)
				}
				require.Error(t, err, "byte %d", i)
				var e *bundle.Error
				require.True(t, errors.As(err, &e) || errors.Is(err, ota.ErrDigest), "byte %d: %v", i, err)
			}
		}
	}
}

// Of a compressed manifest there is one form only, and the stored bytes of a
// compressed index have a digest: else bits of them could change that mean nothing.
func TestOneForm(t *testing.T) {
	file := pack(t, map[string][]byte{"a": make([]byte, 200<<10)}, map[string]bundle.Packing{"a": {Encoding: bundle.EncodingZstd, Frame: 512, Chunk: 512}}, nil)
	z, err := zip.NewReader(bytes.NewReader(file), int64(len(file)))
	require.NoError(t, err)
	// with returns the file with the first two entries stored as given.
	with := func(manifest, index, stored, storedIndex []byte) []byte {
		a := &archive{}
		for i, f := range z.File {
			off, err := f.DataOffset()
			require.NoError(t, err)
			data := file[off : off+int64(f.CompressedSize64)]
			e := entry{name: f.Name, data: string(data)}
			if i < 2 {
				text, data := [][]byte{manifest, index}[i], [][]byte{stored, storedIndex}[i]
				e.data = string(data)
				put := func(h []byte) { // from the method on
					le.PutUint16(h, zip.Deflate)
					le.PutUint32(h[6:], crc32.ChecksumIEEE(text))
					le.PutUint32(h[14:], uint32(len(text)))
				}
				e.local, e.central = func(h []byte) { put(h[8:]) }, func(h []byte) { put(h[10:]) }
			}
			a.entries = append(a.entries, e)
		}
		return a.bytes()
	}
	content := func(i int) (text, stored []byte) {
		r, err := z.File[i].Open()
		require.NoError(t, err)
		text, err = io.ReadAll(r)
		require.NoError(t, err)
		raw, err := z.File[i].OpenRaw()
		require.NoError(t, err)
		stored, err = io.ReadAll(raw)
		require.NoError(t, err)
		return text, stored
	}
	blocks := func(b []byte) []byte { // RFC 1951, section 3.2.4
		n := uint16(len(b))
		return append(le.AppendUint16(le.AppendUint16([]byte{1}, n), ^n), b...)
	}
	manifest, stored := content(0)
	index, storedIndex := content(1)
	require.Equal(t, blocks(manifest), stored)
	require.Less(t, len(storedIndex), len(index)/2)
	require.Equal(t, file, with(manifest, index, stored, storedIndex))

	var packed bytes.Buffer
	w, err := flate.NewWriter(&packed, flate.BestCompression)
	require.NoError(t, err)
	_, err = w.Write(manifest)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	require.ErrorIs(t, everyWay(t, *lax, with(manifest, index, packed.Bytes(), storedIndex)), bundle.ErrFormat)
	other := bytes.Clone(stored)
	other[0] |= 0xf8
	require.ErrorIs(t, everyWay(t, *lax, with(manifest, index, other, storedIndex)), bundle.ErrFormat, "bits that fill up a byte")

	other = bytes.Clone(storedIndex)
	for bit := byte(1); bit != 0; bit <<= 1 {
		other[len(other)-1] ^= bit
		require.Error(t, everyWay(t, *lax, with(manifest, index, stored, other)))
		other[len(other)-1] ^= bit
	}
	var m map[string]any
	require.NoError(t, json.Unmarshal(manifest, &m))
	parts := m["ota"].(map[string]any)["parts"].(map[string]any)
	require.Contains(t, parts, bundle.IndexPart)
	delete(parts, bundle.IndexPart)
	text, err := json.Marshal(m)
	require.NoError(t, err)
	require.ErrorIs(t, everyWay(t, *lax, with(text, index, blocks(text), storedIndex)), bundle.ErrNoDigest)
}

func TestEveryTruncation(t *testing.T) {
	file, _ := mixed(t, 512, 512, 600, nil)
	for n := range file {
		for _, workers := range []int{1, 3} {
			if workers != 1 && n%5 != 0 || testing.Short() && n%7 != 0 {
				continue
			}
			p := &bundle.Policy{AllowUnsigned: true, Workers: workers}
			for _, ranges := range []bool{false, true} {
				var b *bundle.Reader
				var err error
				if ranges {
					b, err = p.OpenRanges(t.Context(), source(file[:n]))
				} else {
					b, err = p.Open(t.Context(), bytes.NewReader(file[:n]))
				}
				if err == nil {
					_, err = contentOf(t.Context(), b, 512, nil)
				}
				require.ErrorIs(t, err, bundle.ErrTruncated, "%d bytes", n)
				require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			}
		}
	}
	for _, more := range []string{"\x00", "PK\x05\x06", string(file)} {
		require.ErrorIs(t, everyWay(t, *lax, append(bytes.Clone(file), more...)), bundle.ErrTrailing)
	}
}

// odd is a Source that does not do what it should.
type odd struct {
	bundle.Source
	size int64
	read func(i int, r io.Reader) io.Reader // of call i
	n    int
	open int
	err  error
	null bool
}

type closing struct {
	io.Reader
	close func()
}

func (c closing) Close() error { c.close(); return nil }

func (o *odd) Size() int64 {
	if o.size != 0 {
		return o.size
	}
	return o.Source.Size()
}

func (o *odd) Ranges(ctx context.Context, rs []ota.Range) (io.ReadCloser, error) {
	if o.err != nil && o.n > 0 {
		return nil, o.err
	}
	if o.null {
		return nil, nil
	}
	r, err := o.Source.Ranges(ctx, rs)
	if err != nil {
		return nil, err
	}
	o.open++
	o.n++
	var rd io.Reader = r
	if o.read != nil {
		rd = o.read(o.n, r)
	}
	return closing{rd, func() { o.open-- }}, nil
}

type impossible struct{ io.Reader }

func (impossible) Read(p []byte) (int, error) { return len(p) + 1, nil }

func TestOddSources(t *testing.T) {
	file, parts := mixed(t, 512, 8<<10, 200<<10, nil)
	plain := func() bundle.Source { return bundle.FileSource(bytes.NewReader(file)) }
	always := func(f func(io.Reader) io.Reader) func(int, io.Reader) io.Reader {
		return func(_ int, r io.Reader) io.Reader { return f(r) }
	}
	later := func(f func(io.Reader) io.Reader) func(int, io.Reader) io.Reader {
		return func(i int, r io.Reader) io.Reader {
			if i == 1 {
				return r
			}
			return f(r)
		}
	}
	nothing := readFunc(func([]byte) (int, error) { return 0, nil })
	for name, c := range map[string]struct {
		src odd
		err error
	}{
		"good":              {odd{}, nil},
		"byte by byte":      {odd{read: always(iotest.OneByteReader)}, nil},
		"halves":            {odd{read: always(iotest.HalfReader)}, nil},
		"data with the end": {odd{read: always(iotest.DataErrReader)}, nil},
		"short":             {odd{read: later(func(r io.Reader) io.Reader { return io.LimitReader(r, 1000) })}, bundle.ErrTruncated},
		"empty":             {odd{read: later(func(r io.Reader) io.Reader { return strings.NewReader("") })}, bundle.ErrTruncated},
		"first short":       {odd{read: always(func(r io.Reader) io.Reader { return io.LimitReader(r, 10) })}, bundle.ErrTruncated},
		"long":              {odd{read: always(func(r io.Reader) io.Reader { return io.MultiReader(r, strings.NewReader("x")) })}, errAny},
		"failing":           {odd{read: later(func(r io.Reader) io.Reader { return io.MultiReader(io.LimitReader(r, 1000), iotest.ErrReader(errFull)) })}, errFull},
		"failing at the end": {odd{read: later(func(r io.Reader) io.Reader {
			return io.MultiReader(r, iotest.ErrReader(errFull))
		})}, errFull},
		"failing calls":     {odd{err: errFull}, errFull},
		"no reader":         {odd{null: true}, errAny},
		"impossible count":  {odd{read: later(func(r io.Reader) io.Reader { return impossible{} })}, errAny},
		"nothing":           {odd{read: later(func(r io.Reader) io.Reader { return nothing })}, io.ErrNoProgress},
		"size less":         {odd{size: int64(len(file)) - 1}, bundle.ErrTruncated},
		"size half":         {odd{size: int64(len(file)) / 2}, bundle.ErrTruncated},
		"size more":         {odd{size: int64(len(file)) + 1}, bundle.ErrTruncated},
		"size of no file":   {odd{size: -1}, errAny},
		"size of the whole": {odd{size: math.MaxInt64}, bundle.ErrTruncated},
	} {
		for _, workers := range []int{1, 3} {
			c.src.Source, c.src.n = plain(), 0
			b, err := (&bundle.Policy{AllowUnsigned: true, Workers: workers}).OpenRanges(t.Context(), &c.src)
			var got map[string]string
			if err == nil {
				got, err = contentOf(t.Context(), b, 4096, nil)
			}
			switch c.err {
			case nil:
				require.NoError(t, err, name)
				require.Len(t, got, len(parts))
			case errAny:
				require.Error(t, err, name)
			default:
				require.ErrorIs(t, err, c.err, name)
			}
			if err != nil {
				var e *bundle.Error
				require.ErrorAs(t, err, &e, name)
			}
			require.Zero(t, c.src.open, "%s: readers not closed", name)
		}
	}
}

var errAny = errors.New("any error")

// In a bubble a goroutine that does not end is a failure.
func TestGoroutinesEnd(t *testing.T) {
	file, parts := mixed(t, 512, 8<<10, 500<<10, nil)
	p := &bundle.Policy{AllowUnsigned: true, Workers: 4}
	bad := bytes.Clone(file)
	in := bytes.Index(bad, []byte("zstd.bin")) + 1 // the manifest
	bad[in+bytes.Index(bad[in:], []byte("zstd.bin"))+300<<10] ^= 1
	// at returns a Reader, some bytes into the part zstd, and its data.
	at := func(t *testing.T, ctx context.Context, file []byte, n int, ranges bool) (*bundle.Reader, *ota.ImagePart) {
		var b *bundle.Reader
		var err error
		if ranges {
			b, err = p.OpenRanges(ctx, source(file))
		} else {
			b, err = p.Open(ctx, bytes.NewReader(file))
		}
		require.NoError(t, err)
		for {
			q, err := b.Next(ctx)
			require.NoError(t, err)
			if q.Name == "zstd" {
				before := runtime.NumGoroutine()
				_, err := io.ReadFull(q.Data, make([]byte, n))
				require.NoError(t, err)
				if n < len(parts["zstd"])/2 {
					require.Greater(t, runtime.NumGoroutine(), before, "there are some")
				}
				return b, q
			}
		}
	}
	for _, ranges := range []bool{false, true} {
		for name, f := range map[string]func(t *testing.T){
			"read": func(t *testing.T) { at(t, context.Background(), file, len(parts["zstd"]), ranges) },
			"closed": func(t *testing.T) {
				b, q := at(t, context.Background(), file, 1, ranges)
				require.NoError(t, b.Close())
				require.NoError(t, b.Close())
				_, err := q.Data.Read(make([]byte, 1))
				require.Error(t, err)
				_, err = b.Next(context.Background())
				require.Error(t, err)
				require.NotEqual(t, io.EOF, err)
			},
			"context": func(t *testing.T) {
				ctx, cancel := context.WithCancel(context.Background())
				_, q := at(t, ctx, file, 1, ranges)
				cancel()
				synctest.Wait()
				_, err := io.Copy(io.Discard, q.Data)
				require.ErrorIs(t, err, context.Canceled)
			},
			"context alone": func(t *testing.T) {
				ctx, cancel := context.WithCancel(context.Background())
				at(t, ctx, file, 1, ranges)
				cancel()
			},
			"next": func(t *testing.T) {
				b, q := at(t, context.Background(), file, 1, ranges)
				_, err := b.Next(context.Background())
				require.Equal(t, io.EOF, err)
				_, err = q.Data.Read(make([]byte, 1))
				require.Error(t, err)
			},
			"error": func(t *testing.T) {
				_, q := at(t, context.Background(), bad, 1, ranges)
				_, err := io.Copy(io.Discard, q.Data)
				require.ErrorIs(t, err, bundle.ErrDigest)
			},
			"closed at once": func(t *testing.T) {
				b, err := p.Open(t.Context(), bytes.NewReader(file))
				require.NoError(t, err)
				require.NoError(t, b.Close())
				_, err = b.Next(t.Context())
				require.Error(t, err)
			},
		} {
			t.Run(fmt.Sprint(name, ", ranges ", ranges), func(t *testing.T) { synctest.Test(t, f) })
		}
	}
}

// An error comes after all that is good before it, whoever decodes.
func TestErrorInOrder(t *testing.T) {
	const frame = 4096
	data := text(40*frame, 1)
	file := pack(t, map[string][]byte{"a": data}, map[string]bundle.Packing{"a": {Encoding: bundle.EncodingZstd, Frame: frame, Chunk: 512}}, nil)
	r := rand.New(rand.NewPCG(1, 1))
	start := bytes.LastIndex(file, []byte("a.bin\x28\xb5\x2f\xfd")) + 5
	require.Greater(t, start, 5)
	for range 100 {
		i := start + r.IntN(len(file)-start-200)
		bad := bytes.Clone(file)
		bad[i] ^= 4
		var first []byte
		for workers := 1; workers < 5; workers++ {
			b, err := (&bundle.Policy{AllowUnsigned: true, Workers: workers}).Open(t.Context(), bytes.NewReader(bad))
			require.NoError(t, err)
			p, err := b.Next(t.Context())
			require.NoError(t, err)
			got, err := io.ReadAll(p.Data)
			require.ErrorIs(t, err, bundle.ErrDigest)
			if workers == 1 {
				first = got
				require.Zero(t, len(got)%frame)
				require.True(t, bytes.Equal(data[:len(got)], got))
			}
			require.Equal(t, len(first), len(got))
			_, err = b.Next(t.Context())
			require.ErrorIs(t, err, bundle.ErrDigest, "an error is final")
		}
	}
}

// Frames cost no memory of their own.
func TestAllocations(t *testing.T) {
	const frame = 512
	allocs := func(frames, workers int) float64 {
		file := pack(t, map[string][]byte{"a": text(frames*frame, 1)}, map[string]bundle.Packing{"a": {Encoding: bundle.EncodingZstd, Frame: frame, Chunk: -1}}, nil)
		buf := make([]byte, 1000)
		return testing.AllocsPerRun(3, func() {
			b, err := (&bundle.Policy{AllowUnsigned: true, Workers: workers}).Open(context.Background(), bytes.NewReader(file))
			require.NoError(t, err)
			p, err := b.Next(context.Background())
			for err == nil {
				_, err = p.Data.Read(buf)
			}
			require.Equal(t, io.EOF, err)
		})
	}
	for _, workers := range []int{1, 3} {
		few, many := allocs(20, workers), allocs(520, workers)
		t.Logf("%d workers: %v allocations for 20 frames, %v for 520", workers, few, many)
		require.Less(t, many-few, 400.0, "not one a frame; under the race detector pools lose some")
	}
}
