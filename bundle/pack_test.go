package bundle_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
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
			"e": {Encoding: bundle.EncodingZstd, Frame: 2 * frame, Window: 1024, Chunk: -1, Level: 19},
		}
		file := pack(t, parts, packs, nil)
		for _, o := range []bundle.WriteOptions{{Workers: 1}, {Workers: 3}, {Scratch: &memory{}}} {
			require.True(t, bytes.Equal(file, pack(t, parts, packs, &o)), "%d", size)
		}
		for _, workers := range []int{1, 2, 4} {
			for _, buf := range []int{1, 100, chunk, 1 << 16} {
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
