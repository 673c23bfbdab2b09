package fetch

import (
	"bytes"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

// content returns n bytes that are the same each time.
func content(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return b
}

// pick returns the bytes of rs.
func pick(data []byte, rs []ota.Range) (out []byte) {
	for _, r := range rs {
		out = append(out, data[r.Off:r.Off+r.Len]...)
	}
	return out
}

// randomRanges returns ranges within n bytes.
func randomRanges(r *rand.Rand, n int64) (rs []ota.Range) {
	for off := int64(0); ; {
		off += r.Int64N(1 << r.IntN(16))
		l := 1 + r.Int64N(1<<r.IntN(16))
		if off+l > n {
			return rs
		}
		rs = append(rs, ota.Range{Off: off, Len: l})
		off += l
	}
}

var loopback = &Policy{AllowHTTP: true, AllowLoopback: true}

func TestRandomRanges(t *testing.T) {
	data := content(300_000)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"x"`)
		http.ServeContent(w, r, "fw.zip", time.Time{}, bytes.NewReader(data))
	}))
	defer srv.Close()
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		f, err := Open(t.Context(), srv.URL, &Options{Policy: loopback, Gap: rnd.Int64N(20000) - 1})
		require.NoError(t, err)
		require.EqualValues(t, len(data), f.Size())
		require.True(t, f.Ranged())
		rs := randomRanges(rnd, f.Size())
		r, err := f.Ranges(t.Context(), rs)
		require.NoError(t, err)
		b, err := io.ReadAll(r)
		require.NoError(t, err)
		require.True(t, bytes.Equal(pick(data, rs), b))
		require.NoError(t, r.Close())
		require.Zero(t, f.Retries())
		r, err = f.Stream(t.Context())
		require.NoError(t, err)
		b, err = io.ReadAll(r)
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, b))
		require.NoError(t, r.Close())
		require.NoError(t, f.Close())
	}
}
