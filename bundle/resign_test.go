package bundle_test

import (
	"archive/zip"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"io"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/bundle"
)

func resign(t *testing.T, b []byte, keys ...crypto.Signer) []byte {
	var out bytes.Buffer
	require.NoError(t, bundle.Resign(t.Context(), &out, bytes.NewReader(b), &bundle.ResignOptions{Keys: keys}))
	return out.Bytes()
}

// Bundles of all makers can be signed, in several steps, and every signature
// stays valid.
func TestResign(t *testing.T) {
	k0, k2 := newKey(t), newKey(t)
	dir := func() []byte { // as of mos build, with a leading directory
		var out bytes.Buffer
		m := &bundle.Manifest{Name: "a", Platform: "p", Version: "1", Parts: []bundle.Part{{Name: "app", Src: "x"}, {Name: "fs", Src: "y"}}}
		files := map[string]bundle.File{"x": bytes.NewReader([]byte("xx")), "y": bytes.NewReader([]byte("yyy"))}
		require.NoError(t, bundle.Write(t.Context(), &out, m, files, &bundle.WriteOptions{Dir: "a-1", Attrs: map[string]json.RawMessage{"note": json.RawMessage(`"n"`)}}))
		return out.Bytes()
	}()
	for name, b := range map[string][]byte{"small": readFile(t, "small.zip"), "signed": readFile(t, "signed.zip"), "with a directory": dir} {
		t.Run(name, func(t *testing.T) {
			before, err := (&bundle.Policy{AllowUnsigned: true}).Verify(t.Context(), bytes.NewReader(b))
			require.NoError(t, err)
			one := resign(t, b, nil, nil, k2)
			both := resign(t, one, k0)
			require.Equal(t, both, resign(t, resign(t, b, k0), nil, nil, k2), "in whichever order")
			require.Equal(t, both, resign(t, both, k0, nil, k2), "again")

			r, err := (&bundle.Policy{Keys: []*ecdsa.PublicKey{&k0.PublicKey, nil, &k2.PublicKey}}).Verify(t.Context(), bytes.NewReader(both))
			require.NoError(t, err)
			require.Len(t, r.Info().SignedBy, 2)
			require.Equal(t, before.Manifest().Raw(), r.Manifest().Raw())
			require.Equal(t, len(before.Attrs()), len(r.Attrs()))
			for k, v := range before.Attrs() {
				require.Equal(t, v, r.Attrs()[k])
			}

			was, err := zip.NewReader(bytes.NewReader(b), int64(len(b)))
			require.NoError(t, err)
			is, err := zip.NewReader(bytes.NewReader(both), int64(len(both)))
			require.NoError(t, err)
			require.Len(t, is.File, len(was.File))
			for i, f := range is.File {
				require.Equal(t, was.File[i].Name, f.Name)
				require.Equal(t, was.File[i].ExternalAttrs, f.ExternalAttrs)
				require.Equal(t, entryData(t, was.File[i]), entryData(t, f))
			}
			sigs, err := bundle.Signatures(is.File[0].Extra[4:])
			require.NoError(t, err)
			require.NotNil(t, sigs[0])
			require.NotNil(t, sigs[2])
			require.Nil(t, sigs[1])
		})
	}
}

func readFile(t *testing.T, name string) []byte {
	b, err := os.ReadFile("testdata/" + name)
	require.NoError(t, err)
	return b
}

func entryData(t *testing.T, f *zip.File) []byte {
	r, err := f.Open()
	require.NoError(t, err)
	b, err := io.ReadAll(r)
	require.NoError(t, err)
	return b
}

func TestResignRefuses(t *testing.T) {
	key := newKey(t)
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	require.NoError(t, err)
	small := readFile(t, "small.zip")
	damaged := bytes.Clone(small)
	damaged[len(damaged)/2] ^= 1
	var full []crypto.Signer
	for range bundle.MaxKeys + 1 {
		full = append(full, key)
	}
	for name, c := range map[string]struct {
		b    []byte
		keys []crypto.Signer
		err  error
	}{
		"damaged":       {damaged, []crypto.Signer{key}, bundle.ErrCRC},
		"no bundle":     {[]byte("hello"), []crypto.Signer{key}, bundle.ErrNotZip},
		"no key":        {small, nil, bundle.ErrPolicy},
		"nil keys":      {small, []crypto.Signer{nil, nil}, bundle.ErrPolicy},
		"P-384":         {small, []crypto.Signer{p384}, bundle.ErrPolicy},
		"too many keys": {small, full, bundle.ErrPolicy},
		"too long":      {small, full[:bundle.MaxKeys], bundle.ErrHeaderTooLong},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			err := bundle.Resign(t.Context(), &out, bytes.NewReader(c.b), &bundle.ResignOptions{Keys: c.keys})
			require.ErrorIs(t, err, c.err)
			var be *bundle.Error
			require.ErrorAs(t, err, &be)
			require.Empty(t, out.Bytes())
		})
	}
	_, err = bundle.Signatures([]byte(`{"sig0":"!"}`))
	require.ErrorIs(t, err, bundle.ErrSignature)
	_, err = bundle.Signatures([]byte(`{"sig0"`))
	require.ErrorIs(t, err, bundle.ErrFormat)
	sigs, err := bundle.Signatures([]byte(`{"note":1}`))
	require.NoError(t, err)
	require.Equal(t, [bundle.MaxKeys][]byte{}, sigs)
}

// Who signs need not have the limits of a device.
func TestResignLarge(t *testing.T) {
	k := newKey(t)
	file := pack(t, map[string][]byte{"a": make([]byte, 100<<10)}, map[string]bundle.Packing{"a": {Encoding: bundle.EncodingZstd, Frame: bundle.MaxFrame}}, nil)
	signed := resign(t, file, k)
	p := &bundle.Policy{Keys: []*ecdsa.PublicKey{&k.PublicKey}, MaxWindow: bundle.MaxFrame}
	_, err := p.Verify(t.Context(), bytes.NewReader(signed))
	require.NoError(t, err)
}
