package bundle_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

// text returns n bytes that compress about as well as programs do.
func text(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, n+64)
	for len(b) < n {
		if k := r.IntN(4); k > 0 && len(b) > 100 {
			from := r.IntN(len(b) - 50)
			b = append(b, b[from:from+1+r.IntN(49)]...)
		} else {
			for range 12 {
				b = append(b, byte(r.Uint32()))
			}
		}
	}
	return b[:n]
}

// pack writes a bundle of the parts, each packed as pack says.
func pack(t testing.TB, parts map[string][]byte, pack map[string]bundle.Packing, o *bundle.WriteOptions) []byte {
	t.Helper()
	m := &bundle.Manifest{Name: "n", Platform: "p", Version: "v"}
	files := map[string]bundle.File{}
	for _, name := range sortedKeys(parts) {
		m.Parts = append(m.Parts, bundle.Part{Name: name, Src: name + ".bin"})
		files[name+".bin"] = bytes.NewReader(parts[name])
	}
	if o == nil {
		o = &bundle.WriteOptions{}
	}
	c := *o
	c.Pack = pack
	var b bytes.Buffer
	require.NoError(t, bundle.Write(t.Context(), &b, m, files, &c))
	return b.Bytes()
}

func sortedKeys[V any](m map[string]V) (keys []string) {
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// memory is a Scratch.
type memory struct {
	mu sync.Mutex
	b  []byte
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := int(off) + len(p); n > len(m.b) {
		m.b = append(m.b, make([]byte, n-len(m.b))...)
	}
	return copy(m.b[off:], p), nil
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if off >= int64(len(m.b)) {
		return 0, io.EOF
	}
	return copy(p, m.b[off:]), nil
}

// counting is a Source that remembers what it was asked for.
type counting struct {
	bundle.Source
	asked [][]ota.Range
	bytes int64
}

func (c *counting) Ranges(ctx context.Context, rs []ota.Range) (io.ReadCloser, error) {
	end := int64(-1)
	for _, r := range rs {
		if r.Off <= end || r.Len <= 0 || r.Len > c.Size()-r.Off {
			return nil, fmt.Errorf("asked for %v", rs)
		}
		end = r.Off + r.Len
		c.bytes += r.Len
	}
	c.asked = append(c.asked, slices.Clone(rs))
	return c.Source.Ranges(ctx, rs)
}

func source(b []byte) *counting { return &counting{Source: bundle.FileSource(bytes.NewReader(b))} }

// contentOf reads all parts, and checks them as an installer does. sel says which
// ranges of a part to select; nil means to read all.
func contentOf(ctx context.Context, b *bundle.Reader, buf int, sel func(*ota.ImagePart) []ota.Range) (map[string]string, error) {
	got := map[string]string{}
	for {
		q, err := b.Next(ctx)
		if err == io.EOF {
			return got, nil
		}
		if err != nil {
			return got, err
		}
		want := []ota.Range{{Len: q.Size}}
		if s, ok := q.Data.(ota.Selector); ok && sel != nil {
			want = sel(q)
			if err := s.Select(want); err != nil {
				return got, err
			}
		}
		var data []byte
		p := make([]byte, buf)
		for {
			n, err := q.Data.Read(p)
			data = append(data, p[:n]...)
			if err == io.EOF {
				break
			}
			if err != nil {
				return got, err
			}
		}
		if len(want) == 1 && want[0].Len == q.Size && q.SHA256 != nil && sha256.Sum256(data) != *q.SHA256 {
			return got, ota.ErrDigest
		}
		if q.Chunks != nil {
			rest := data
			for _, w := range want {
				for off := w.Off; off < w.Off+w.Len; off += q.Chunks.Size {
					n := min(q.Chunks.Size, q.Size-off)
					if int64(len(rest)) < n || sha256.Sum256(rest[:n]) != q.Chunks.SHA256[off/q.Chunks.Size] {
						return got, ota.ErrDigest
					}
					rest = rest[n:]
				}
			}
			if len(rest) > 0 {
				return got, errors.New("more than was selected")
			}
		}
		got[q.Name] = string(data)
	}
}

func TestPackedRoundTrip(t *testing.T) {
	const chunk, frame = 512, 2048
	sizes := []int{1, 2, 255, 256, 257, chunk - 1, chunk, chunk + 1, frame - 1, frame, frame + 1, 3*frame - chunk, 3*frame + 1, 10*frame + 777}
	for _, size := range sizes {
		parts := map[string][]byte{"a": text(size, 1), "b": text(size, 2), "c": text(size, 3), "d": text(size, 4), "e": make([]byte, size), "f": text(size, 5)}
		packs := map[string]bundle.Packing{
			"a": {Encoding: bundle.EncodingZstd, Frame: frame, Chunk: chunk},
			"b": {Encoding: bundle.EncodingDeflate},
			"c": {Encoding: bundle.EncodingDeflate, Chunk: chunk},
			"d": {Chunk: chunk},
			"e": {Encoding: bundle.EncodingZstd, Frame: 2 * frame, Window: 1024, Chunk: -1, Level: 6},
		}
		file := pack(t, parts, packs, nil)
		for _, o := range []bundle.WriteOptions{{Workers: 1}, {Workers: 3}, {Scratch: &memory{}}} {
			require.True(t, bytes.Equal(file, pack(t, parts, packs, &o)), "%d", size)
		}
		for _, workers := range []int{1, 3} {
			for _, buf := range []int{1, 100, chunk, 1 << 16} {
				if buf == 1 && size > 2*chunk {
					continue
				}
				p := &bundle.Policy{AllowUnsigned: true, Workers: workers}
				b, err := p.Open(t.Context(), bytes.NewReader(file))
				require.NoError(t, err, size)
				check := func(b *bundle.Reader) {
					got, err := contentOf(t.Context(), b, buf, nil)
					require.NoError(t, err, size)
					for name, want := range parts {
						require.True(t, string(want) == got[name], "%s of %d", name, size)
					}
				}
				check(b)
				b, err = p.OpenRanges(t.Context(), source(file))
				require.NoError(t, err, size)
				check(b)
			}
		}
		_, err := lax.Verify(t.Context(), bytes.NewReader(file))
		require.NoError(t, err)
	}
}

// mixed is a bundle with parts of every kind, and what is in them.
func mixed(t testing.TB, chunk, frame int64, size int, o *bundle.WriteOptions) ([]byte, map[string][]byte) {
	parts := map[string][]byte{"deflated": text(size, 1), "plain": text(size, 2), "stored": text(size, 3), "zstd": text(size, 4)}
	return pack(t, parts, map[string]bundle.Packing{
		"deflated": {Encoding: bundle.EncodingDeflate, Chunk: chunk},
		"stored":   {Chunk: chunk},
		"zstd":     {Encoding: bundle.EncodingZstd, Chunk: chunk, Frame: frame},
	}, o), parts
}

// What is selected is read, and nothing else.
func TestSelect(t *testing.T) {
	const chunk, frame, size = 512, 2048, 40*2048 + 700
	file, parts := mixed(t, chunk, frame, size, nil)
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 60 {
		n := int64((size-1)/chunk + 1)
		density := r.IntN(101)
		wanted := map[string][]ota.Range{}
		want := map[string]string{"deflated": string(parts["deflated"]), "plain": string(parts["plain"]), "stored": "", "zstd": ""}
		cost := int64(len(parts["plain"]))
		for _, name := range []string{"stored", "zstd"} {
			for i := range n {
				off, end := i*chunk, min((i+1)*chunk, int64(size))
				if r.IntN(100) >= density && !(round == 0 && i == n-1) {
					continue
				}
				want[name] += string(parts[name][off:end])
				if k := len(wanted[name]) - 1; k >= 0 && wanted[name][k].Off+wanted[name][k].Len == off {
					wanted[name][k].Len += end - off
				} else {
					wanted[name] = append(wanted[name], ota.Range{Off: off, Len: end - off})
				}
				if name == "stored" {
					cost += end - off
				}
			}
		}
		src := source(file)
		b, err := (&bundle.Policy{AllowUnsigned: true, Workers: 1 + round%3}).OpenRanges(t.Context(), src)
		require.NoError(t, err)
		got, err := contentOf(t.Context(), b, 1+r.IntN(5000), func(p *ota.ImagePart) []ota.Range { return wanted[p.Name] })
		require.NoError(t, err)
		for name := range want {
			require.True(t, want[name] == got[name], name)
		}
		// The frames that the chunks of zstd are in.
		z, err := lax.Open(t.Context(), bytes.NewReader(file))
		require.NoError(t, err)
		st := z.Manifest().Part("zstd").Storage
		cost += z.Manifest().Part("deflated").Storage.Size
		if len(wanted["zstd"]) > 0 {
			cost += st.Size
		}
		require.LessOrEqual(t, src.bytes, cost+64<<10+z.Manifest().Part(bundle.IndexPart).Size+1000)
		require.LessOrEqual(t, len(src.asked), 3+len(parts))
		if density == 0 {
			require.Less(t, src.bytes, int64(len(parts["plain"]))+z.Manifest().Part("deflated").Storage.Size+80<<10)
		}
	}
}

// One chunk of a large part costs one frame, in one request.
func TestSelectOne(t *testing.T) {
	const frame, chunk = 16 << 10, 4 << 10
	data := text(64*frame, 1)
	file := pack(t, map[string][]byte{"a": data}, map[string]bundle.Packing{"a": {Encoding: bundle.EncodingZstd, Frame: frame, Chunk: chunk}}, nil)
	src := source(file)
	b, err := lax.OpenRanges(t.Context(), src)
	require.NoError(t, err)
	require.LessOrEqual(t, len(src.asked), 2)
	st := b.Manifest().Part("a").Storage
	before := src.bytes
	got, err := contentOf(t.Context(), b, 4096, func(*ota.ImagePart) []ota.Range { return []ota.Range{{Off: 40*frame + chunk, Len: chunk}} })
	require.NoError(t, err)
	require.Equal(t, string(data[40*frame+chunk:][:chunk]), got["a"])
	require.Less(t, src.bytes-before, 2*st.Size/64+1000, "one frame, the directory and the end")
	require.LessOrEqual(t, len(src.asked), 3)

	// Nothing at all.
	src = source(file)
	b, err = lax.OpenRanges(t.Context(), src)
	require.NoError(t, err)
	before = src.bytes
	for err == nil {
		_, err = b.Next(t.Context())
	}
	require.Equal(t, io.EOF, err)
	require.Less(t, src.bytes-before, int64(1000))
}

// metered is a bundle on a server.
type metered struct {
	bundle.Source
	io.Reader
	n int64
}

func (m *metered) Downloaded() int64 { return m.n }

// A bundle tells what was downloaded of it if what it is read from does.
func TestDownloaded(t *testing.T) {
	file := pack(t, map[string][]byte{"a": text(100000, 1)}, nil, nil)
	src := &metered{Source: source(file), Reader: bytes.NewReader(file), n: 123}
	b, err := lax.OpenRanges(t.Context(), src)
	require.NoError(t, err)
	require.EqualValues(t, 123, b.Downloaded())
	b, err = lax.Open(t.Context(), src)
	require.NoError(t, err)
	src.n = 456
	require.EqualValues(t, 456, b.Downloaded())
	b, err = lax.Open(t.Context(), bytes.NewReader(file))
	require.NoError(t, err)
	require.Zero(t, b.Downloaded())
	b, err = lax.OpenRanges(t.Context(), source(file))
	require.NoError(t, err)
	require.Zero(t, b.Downloaded())
}

func TestSelectRefused(t *testing.T) {
	const chunk, size = 512, 5*512 + 100
	file, _ := mixed(t, chunk, 1024, size, nil)
	for _, wanted := range [][]ota.Range{
		{{Off: -512, Len: 512}}, {{Off: 0, Len: 0}}, {{Off: 0, Len: -512}}, {{Off: 1, Len: 512}}, {{Off: 0, Len: 511}}, {{Off: 0, Len: 513}},
		{{Off: 512, Len: 512}, {Off: 0, Len: 512}}, {{Off: 0, Len: 512}, {Off: 512, Len: 512}}, {{Off: 0, Len: 1024}, {Off: 512, Len: 512}},
		{{Off: 0, Len: size + 1}}, {{Off: 3072, Len: 1}}, {{Off: 2560, Len: 101}}, {{Off: 512, Len: 1<<63 - 1}}, {{Off: 1<<63 - 512, Len: 512}},
	} {
		b, err := lax.OpenRanges(t.Context(), source(file))
		require.NoError(t, err)
		for {
			p, err := b.Next(t.Context())
			if err == io.EOF {
				break
			}
			require.NoError(t, err)
			s, ok := p.Data.(ota.Selector)
			require.Equal(t, p.Name == "stored" || p.Name == "zstd", ok, p.Name)
			if ok {
				require.ErrorIs(t, s.Select(wanted), ota.ErrInvalid, "%v", wanted)
			}
		}
	}
	b, err := lax.OpenRanges(t.Context(), source(file))
	require.NoError(t, err)
	for {
		p, err := b.Next(t.Context())
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		if s, ok := p.Data.(ota.Selector); ok {
			require.NoError(t, s.Select([]ota.Range{{Off: 512, Len: 512}}))
			require.ErrorIs(t, s.Select(nil), ota.ErrInvalid, "twice")
			_, err = p.Data.Read(make([]byte, 1))
			require.NoError(t, err)
			require.ErrorIs(t, s.Select(nil), ota.ErrInvalid, "too late")
		}
	}
	// As a stream all has to be read anyway.
	b, err = lax.Open(t.Context(), bytes.NewReader(file))
	require.NoError(t, err)
	p, err := b.Next(t.Context())
	require.NoError(t, err)
	_, ok := p.Data.(ota.Selector)
	require.False(t, ok)
}

// tool returns the path of a program, without which the test is skipped, or fails
// where everything must be there.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			require.NoError(t, err, "apt-get install %s", name)
		}
		t.Skipf("needs %s: apt-get install %s", name, name)
	}
	return path
}

// What other programs make of bundles: unzip finds nothing wrong, and zstd
// decodes what it extracts.
func TestTools(t *testing.T) {
	unzip, zstd := tool(t, "unzip"), tool(t, "zstd")
	run := func(stdin []byte, name string, args ...string) []byte {
		c := exec.Command(name, args...)
		c.Stdin = bytes.NewReader(stdin)
		var stderr bytes.Buffer
		c.Stderr = &stderr
		out, err := c.Output()
		require.NoError(t, err, "%s %v: %s%s", name, args, out, &stderr)
		return out
	}
	for _, size := range []int{1, 300, 70000, 400 << 10} {
		for _, k := range []bundle.Packing{{Encoding: bundle.EncodingZstd}, {Encoding: bundle.EncodingZstd, Frame: 16 << 10}, {Encoding: bundle.EncodingZstd, Frame: 256 << 10, Window: 64 << 10, Level: 12, Chunk: -1}} {
			parts := map[string][]byte{"a": text(size, 1), "b": text(size, 2), "c": make([]byte, size)}
			file := pack(t, parts, map[string]bundle.Packing{"a": k, "b": {Encoding: bundle.EncodingDeflate}, "c": {Chunk: 4096}}, nil)
			path := filepath.Join(t.TempDir(), "fw.zip")
			require.NoError(t, os.WriteFile(path, file, 0o600))
			require.Contains(t, string(run(nil, unzip, "-t", path)), "No errors detected")
			stored := run(nil, unzip, "-p", path, "a.bin")
			run(stored, zstd, "-t")
			require.True(t, bytes.Equal(parts["a"], run(stored, zstd, "-dc")))
			require.True(t, bytes.Equal(parts["b"], run(nil, unzip, "-p", path, "b.bin")))
			require.True(t, bytes.Equal(parts["c"], run(nil, unzip, "-p", path, "c.bin")))
			b, err := lax.Verify(t.Context(), bytes.NewReader(file))
			require.NoError(t, err)
			require.Equal(t, string(b.Manifest().Raw()), string(run(nil, unzip, "-p", path, "manifest.json")))
			require.Equal(t, sha256.Sum256(stored), b.Manifest().Part("a").Storage.SHA256)
		}
	}
}

func TestResignPacked(t *testing.T) {
	file, parts := mixed(t, 512, 1024, 5000, nil)
	k := newKey(t)
	var b bytes.Buffer
	require.NoError(t, bundle.Resign(t.Context(), &b, bytes.NewReader(file), &bundle.ResignOptions{Keys: []crypto.Signer{k}}))
	r, err := (&bundle.Policy{Keys: []*ecdsa.PublicKey{&k.PublicKey}}).Open(t.Context(), bytes.NewReader(b.Bytes()))
	require.NoError(t, err)
	got, err := contentOf(t.Context(), r, 1000, nil)
	require.NoError(t, err)
	require.Equal(t, string(parts["zstd"]), got["zstd"])
}

// Frames whose bytes are all the same are compressed once, and are what they would be
// if each were.
func TestUniformFrames(t *testing.T) {
	const frame, chunk = 2048, 512
	var all []byte
	for i, b := range []byte{0, 0, 255, 0, 1, 255, 255, 0, 0, 1} {
		all = append(all, bytes.Repeat([]byte{b}, frame)...)
		if i%3 == 2 {
			all = append(all, text(frame, uint64(i))...)
		}
	}
	all = append(all, make([]byte, 700)...) // the last one is shorter, but not other
	k := map[string]bundle.Packing{"a": {Encoding: bundle.EncodingZstd, Frame: frame, Chunk: chunk}}
	file := pack(t, map[string][]byte{"a": all}, k, &bundle.WriteOptions{Workers: 1})
	for _, workers := range []int{2, 5} {
		require.True(t, bytes.Equal(file, pack(t, map[string][]byte{"a": all}, k, &bundle.WriteOptions{Workers: workers})), workers)
	}
	r, err := lax.Open(t.Context(), bytes.NewReader(file))
	require.NoError(t, err)
	got, err := contentOf(t.Context(), r, 1000, nil) // checks the chunks
	require.NoError(t, err)
	require.True(t, string(all) == got["a"])
	for off := 0; off < len(all); off += frame {
		piece := all[off:min(off+frame, len(all))]
		alone := pack(t, map[string][]byte{"a": piece}, k, nil)
		r, err := lax.Verify(t.Context(), bytes.NewReader(alone))
		require.NoError(t, err)
		s, err := r.Stored(bytes.NewReader(alone), "a")
		require.NoError(t, err)
		require.True(t, bytes.Contains(file, stored(t, s)), "frame at %d", off)
	}
}

// A bundle can be made again from what was read of it.
func TestRepack(t *testing.T) {
	file, parts := mixed(t, 512, 2048, 9000, nil)
	r, err := lax.Verify(t.Context(), bytes.NewReader(file))
	require.NoError(t, err)
	files, packs := map[string]bundle.File{}, map[string]bundle.Packing{}
	for _, p := range r.Manifest().Parts {
		if p.Name != r.Manifest().Index {
			files[p.Src], packs[p.Name] = bytes.NewReader(parts[p.Name]), p.Packing()
		}
	}
	var again bytes.Buffer
	require.NoError(t, bundle.Write(t.Context(), &again, r.Manifest(), files, &bundle.WriteOptions{Pack: packs}))
	require.True(t, bytes.Equal(file, again.Bytes()))
	require.Equal(t, "ota-index", r.Manifest().Index)

	// And one whose parts are all stored as they are has nothing of ours left.
	again.Reset()
	require.NoError(t, bundle.Write(t.Context(), &again, r.Manifest(), files, nil))
	r, err = lax.Verify(t.Context(), bytes.NewReader(again.Bytes()))
	require.NoError(t, err)
	require.NotContains(t, r.Manifest().Extra, "ota")
	require.Len(t, r.Manifest().Parts, 4)
	require.Zero(t, again.Bytes()[8], "the manifest is stored")
}

func TestPackRefused(t *testing.T) {
	z := bundle.EncodingZstd
	for name, c := range map[string]struct {
		k   bundle.Packing
		err error
	}{
		"encoding":           {bundle.Packing{Encoding: "xz"}, bundle.ErrUnsupported},
		"frame not even":     {bundle.Packing{Encoding: z, Frame: 1000}, bundle.ErrManifest},
		"frame negative":     {bundle.Packing{Encoding: z, Frame: -512}, bundle.ErrManifest},
		"frame too large":    {bundle.Packing{Encoding: z, Frame: 128 << 20}, bundle.ErrManifest},
		"window not a power": {bundle.Packing{Encoding: z, Window: 3000}, bundle.ErrManifest},
		"window too small":   {bundle.Packing{Encoding: z, Window: 512}, bundle.ErrManifest},
		"window negative":    {bundle.Packing{Encoding: z, Window: -1024}, bundle.ErrManifest},
		"window of 2 frames": {bundle.Packing{Encoding: z, Frame: 1024, Window: 2048}, bundle.ErrManifest},
		"chunk of 2 frames":  {bundle.Packing{Encoding: z, Frame: 1024, Chunk: 2048}, bundle.ErrManifest},
		"chunk not even":     {bundle.Packing{Chunk: 100}, bundle.ErrManifest},
		"chunk too large":    {bundle.Packing{Chunk: 128 << 20}, bundle.ErrManifest},
		"level":              {bundle.Packing{Encoding: z, Level: 23}, bundle.ErrManifest},
		"level negative":     {bundle.Packing{Encoding: z, Level: -1}, bundle.ErrManifest},
		"level of deflate":   {bundle.Packing{Encoding: bundle.EncodingDeflate, Level: 10}, bundle.ErrManifest},
		"level of nothing":   {bundle.Packing{Level: 1}, bundle.ErrManifest},
		"frames of deflate":  {bundle.Packing{Encoding: bundle.EncodingDeflate, Frame: 1024}, bundle.ErrManifest},
		"frames of nothing":  {bundle.Packing{Frame: 1024}, bundle.ErrManifest},
	} {
		m := &bundle.Manifest{Parts: []bundle.Part{{Name: "a", Src: "a.bin"}}}
		files := map[string]bundle.File{"a.bin": bytes.NewReader(make([]byte, 5000))}
		var b bytes.Buffer
		err := bundle.Write(t.Context(), &b, m, files, &bundle.WriteOptions{Pack: map[string]bundle.Packing{"a": c.k}})
		require.ErrorIs(t, err, c.err, name)
		var e *bundle.Error
		require.ErrorAs(t, err, &e, name)
		require.Zero(t, b.Len(), "%s: nothing is written", name)
	}
	write := func(m *bundle.Manifest, f bundle.File, k bundle.Packing, o bundle.WriteOptions) error {
		o.Pack = map[string]bundle.Packing{"a": k}
		return bundle.Write(t.Context(), io.Discard, m, map[string]bundle.File{"a.bin": f}, &o)
	}
	one := func(more ...bundle.Part) *bundle.Manifest {
		return &bundle.Manifest{Parts: append([]bundle.Part{{Name: "a", Src: "a.bin"}}, more...)}
	}
	k := bundle.Packing{Encoding: z, Frame: 1024}
	require.ErrorIs(t, write(&bundle.Manifest{Parts: []bundle.Part{{Name: "b", Src: "a.bin"}}}, strings.NewReader("x"), k, bundle.WriteOptions{}), bundle.ErrManifest)
	require.ErrorIs(t, write(one(bundle.Part{Name: bundle.IndexPart, Fill: new(byte), Size: 1}), strings.NewReader("x"), k, bundle.WriteOptions{}), bundle.ErrManifest, "the name is taken")
	require.ErrorIs(t, write(one(), strings.NewReader(""), k, bundle.WriteOptions{}), bundle.ErrManifest, "empty")
	// A failing Scratch, one that loses data, and files that change between two readings.
	for _, workers := range []int{1, 3} {
		data := text(50000, 1)
		require.NoError(t, write(one(), bytes.NewReader(data), k, bundle.WriteOptions{Workers: workers, Scratch: &memory{}}))
		require.ErrorIs(t, write(one(), bytes.NewReader(data), k, bundle.WriteOptions{Workers: workers, Scratch: lossy{err: errFull}}), errFull)
		require.Error(t, write(one(), bytes.NewReader(data), k, bundle.WriteOptions{Workers: workers, Scratch: lossy{}}))
		require.ErrorIs(t, write(one(), bytes.NewReader(data), k, bundle.WriteOptions{Workers: workers, Scratch: lossy{zeros: true}}), ota.ErrChanged)
		for _, e := range []bundle.Encoding{z, bundle.EncodingDeflate} {
			require.ErrorIs(t, write(one(), &drifting{size: 5000}, bundle.Packing{Encoding: e}, bundle.WriteOptions{Workers: workers}), ota.ErrChanged)
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			m := one()
			err := bundle.Write(ctx, io.Discard, m, map[string]bundle.File{"a.bin": bytes.NewReader(data)}, &bundle.WriteOptions{Pack: map[string]bundle.Packing{"a": {Encoding: e}}})
			require.ErrorIs(t, err, context.Canceled)
		}
	}
}

// lossy is a Scratch that keeps nothing.
type lossy struct {
	err   error
	zeros bool
}

func (l lossy) WriteAt(p []byte, off int64) (int, error) { return len(p), l.err }

func (l lossy) ReadAt(p []byte, off int64) (int, error) {
	if !l.zeros {
		return 0, io.EOF
	}
	clear(p)
	return len(p), nil
}

// drifting yields something else whenever it is read.
type drifting struct{ size, n int64 }

func (d *drifting) Size() int64 { return d.size }

func (d *drifting) ReadAt(p []byte, off int64) (int, error) {
	d.n++
	n := min(int64(len(p)), d.size-off)
	for i := range n {
		p[i] = byte(d.n)
	}
	return int(n), nil
}
