package bundle_test

import (
	"archive/zip"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	crand "crypto/rand"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/bundle/trust"
	"github.com/stretchr/testify/require"
)

// A large compressed bundle, signed in both ways, of which bytes are changed here and
// there and in all that is not content: it is refused, and for a reason.
func TestLargeChanged(t *testing.T) {
	k, n := newKey(t), noteKey(t, "release")
	p := &bundle.Policy{Keys: []*ecdsa.PublicKey{&k.PublicKey}, Trust: anchor(t, 1, nil, n), Workers: 2}
	parts := map[string][]byte{"chunked": text(256<<10, 1), "zeros": make([]byte, 512<<10), "zstd": text(1<<20+777, 2)}
	file := pack(t, parts, map[string]bundle.Packing{
		"chunked": {Chunk: 64 << 10},
		"zeros":   {Encoding: bundle.EncodingZstd},
		"zstd":    {Encoding: bundle.EncodingZstd, Frame: 256 << 10},
	}, &bundle.WriteOptions{Keys: []crypto.Signer{k}, NoteKeys: []*trust.Signer{n}})
	_, err := p.Verify(t.Context(), bytes.NewReader(file))
	require.NoError(t, err)

	r := rand.New(rand.NewPCG(3, 4))
	var at []int
	for range 40 {
		at = append(at, r.IntN(len(file)))
	}
	for i := range 40 { // of the first header and of the directory
		at = append(at, i*13, len(file)-1-i*11)
	}
	for _, i := range at {
		bad := bytes.Clone(file)
		bad[i] ^= 1 << r.IntN(8)
		_, err := p.Verify(t.Context(), bytes.NewReader(bad))
		requireReason(t, err, "byte %d", i)
		b, err := p.OpenRanges(t.Context(), source(bad))
		if err == nil {
			_, err = contentOf(t.Context(), b, 64<<10, nil)
		}
		var e *bundle.Error
		require.True(t, errors.As(err, &e) || errors.Is(err, ota.ErrDigest), "byte %d with ranges: %v", i, err)
	}
}

// Of the signatures, manifests, indexes and parts of two compressed bundles only those
// of one fit together.
func TestPackedMixAndMatch(t *testing.T) {
	k, n := newKey(t), noteKey(t, "release")
	p := &bundle.Policy{Keys: []*ecdsa.PublicKey{&k.PublicKey}, Trust: anchor(t, 1, nil, n)}
	type piece struct {
		zip.FileHeader
		raw []byte
	}
	var of [2][]piece // the manifest, whose header has the signatures, the index, two parts
	for i := range of {
		file := pack(t, map[string][]byte{"a": text(5000, uint64(i)), "b": text(5000, uint64(2+i))}, map[string]bundle.Packing{
			"a": {Encoding: bundle.EncodingZstd, Frame: 2048, Chunk: 512}, "b": {Encoding: bundle.EncodingDeflate, Chunk: 512},
		}, &bundle.WriteOptions{Keys: []crypto.Signer{k}, NoteKeys: []*trust.Signer{n}})
		_, err := p.Verify(t.Context(), bytes.NewReader(file))
		require.NoError(t, err)
		z, err := zip.NewReader(bytes.NewReader(file), int64(len(file)))
		require.NoError(t, err)
		for _, f := range z.File {
			r, err := f.OpenRaw()
			require.NoError(t, err)
			raw, err := io.ReadAll(r)
			require.NoError(t, err)
			h := f.FileHeader
			h.CreatorVersion, h.ReaderVersion, h.Flags = 20, 20, 0
			of[i] = append(of[i], piece{h, raw})
		}
		require.Len(t, of[i], 4)
	}
	accepted := 0
	for mix := range 32 { // whose signatures, then whose entry
		var b bytes.Buffer
		w := zip.NewWriter(&b)
		for i := range 4 {
			from := of[mix>>i&1][i]
			if i == 0 {
				from.Extra = of[mix>>4][0].Extra
			}
			e, err := w.CreateRaw(&from.FileHeader)
			require.NoError(t, err)
			_, err = e.Write(from.raw)
			require.NoError(t, err)
		}
		require.NoError(t, w.Close())
		err := everyWay(t, *p, b.Bytes())
		if mix == 0 || mix == 31 {
			require.NoError(t, err)
			accepted++
			continue
		}
		requireReason(t, err, "mix %05b", mix)
	}
	require.Equal(t, 2, accepted)
}

// One key counts once, whatever names it goes by.
func TestNoteOneKeyTwoNames(t *testing.T) {
	_, private, err := ed25519.GenerateKey(crand.Reader)
	require.NoError(t, err)
	one, err := trust.NewSigner("one", private)
	require.NoError(t, err)
	two, err := trust.NewSigner("two", private)
	require.NoError(t, err)
	other := noteKey(t, "other")
	p := bundle.Policy{Trust: anchor(t, 2, nil, one, other)}
	for name, c := range map[string]struct {
		keys []*trust.Signer
		err  error
	}{
		"one key":             {[]*trust.Signer{one}, bundle.ErrUnsigned},
		"one key, two names":  {[]*trust.Signer{one, two}, bundle.ErrUnsigned},
		"two keys":            {[]*trust.Signer{one, other}, nil},
		"two, and once again": {[]*trust.Signer{one, two, other}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			file := pack(t, map[string][]byte{"a": text(3000, 1)}, map[string]bundle.Packing{"a": {Encoding: bundle.EncodingZstd}}, &bundle.WriteOptions{NoteKeys: c.keys})
			require.ErrorIs(t, everyWay(t, p, file), c.err)
		})
	}
}
