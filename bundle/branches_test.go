package bundle_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/big"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

// streamed returns good with a data descriptor behind the application.
func streamed(descriptor string) *archive {
	return with(func(a *archive) {
		a.entries[1].flags = 1 << 3
		a.entries[1].descriptor = descriptor
	})
}

func descriptor(data string) string {
	b := le.AppendUint32(nil, 0x08074b50)
	b = le.AppendUint32(b, crc32.ChecksumIEEE([]byte(data)))
	b = le.AppendUint32(b, uint32(len(data)))
	return string(le.AppendUint32(b, uint32(len(data))))
}

// A source that ends or fails inside of a data descriptor says so.
func TestDescriptorCut(t *testing.T) {
	file := streamed(descriptor(appData)).bytes()
	_, _, err := content(t.Context(), lax, bytes.NewReader(file))
	require.NoError(t, err)
	at := bytes.Index(file, []byte("PK\x07\x08"))
	broken := errors.New("broken")
	for n := range 16 {
		_, _, err := content(t.Context(), lax, bytes.NewReader(file[:at+n]))
		require.ErrorIs(t, err, bundle.ErrTruncated, "after %d bytes", n)
		left := file[:at+n]
		_, _, err = content(t.Context(), lax, readFunc(func(p []byte) (int, error) {
			k := copy(p, left)
			if left = left[k:]; k == 0 {
				return 0, broken
			}
			return k, nil
		}))
		require.ErrorIs(t, err, broken, "after %d bytes", n)
	}
}

// Errors of a part's data are final, and what is asked for nothing gives nothing.
func TestDataAfterErrors(t *testing.T) {
	file := good().bytes()
	at := bytes.Index(file, []byte(appData)) + 5
	broken := errors.New("broken")
	opened := func() (*bundle.Reader, *ota.ImagePart) {
		b, err := lax.Open(t.Context(), io.MultiReader(bytes.NewReader(file[:at]), readFunc(func([]byte) (int, error) { return 0, broken })))
		require.NoError(t, err)
		p, err := b.Next(t.Context())
		require.NoError(t, err)
		n, err := p.Data.Read(nil)
		require.NoError(t, err)
		require.Zero(t, n)
		return b, p
	}
	_, p := opened()
	got, err := io.ReadAll(p.Data)
	require.ErrorIs(t, err, broken)
	require.Equal(t, appData[:5], string(got))
	_, err = p.Data.Read(make([]byte, 1))
	require.ErrorIs(t, err, broken)

	b, p := opened()
	_, err = b.Next(t.Context())
	require.ErrorIs(t, err, broken)
	_, err = p.Data.Read(make([]byte, 1))
	require.ErrorContains(t, err, "after the next part")
}

// Fill parts are held against both digests, before anything is installed.
func TestFillDigests(t *testing.T) {
	manifest := func(sha1 string) []byte {
		m := fmt.Sprintf(`{"parts":{"nvs":{"size":3,"fill":7,"cs_sha1":%q}}}`, sha1)
		return (&archive{entries: []entry{{name: "manifest.json", data: m}}}).bytes()
	}
	_, _, err := content(t.Context(), lax, bytes.NewReader(manifest(sum1("\a\a\b"))))
	require.ErrorIs(t, err, bundle.ErrDigest)
	b, err := lax.Open(t.Context(), bytes.NewReader(manifest(sum1("\a\a\a"))))
	require.NoError(t, err)
	p, err := b.Next(t.Context())
	require.NoError(t, err)
	n, err := p.Data.Read(nil)
	require.NoError(t, err)
	require.Zero(t, n)
	got, err := io.ReadAll(p.Data)
	require.NoError(t, err)
	require.Equal(t, "\a\a\a", string(got))

	// The computation can be given up.
	ctx, cancel := context.WithCancel(t.Context())
	file := bytes.NewReader(manifest(sum1("\a\a\a")))
	_, err = lax.Open(ctx, readFunc(func(p []byte) (int, error) { cancel(); return file.Read(p) }))
	require.ErrorIs(t, err, context.Canceled)
}

// A key that is not on the curve is refused, not passed over.
func TestKeyOffTheCurve(t *testing.T) {
	k := &ecdsa.PublicKey{Curve: elliptic.P256(), X: big.NewInt(1), Y: big.NewInt(1)}
	_, err := (&bundle.Policy{Keys: []*ecdsa.PublicKey{k}}).Open(t.Context(), bytes.NewReader(good().bytes()))
	require.ErrorIs(t, err, bundle.ErrPolicy)
	_, err = bundle.KeyID(k)
	require.ErrorIs(t, err, ota.ErrInvalid)
}

// Manifests that were not parsed are checked, too.
func TestManifestMadeByHand(t *testing.T) {
	part := func(name string) bundle.Part { return bundle.Part{Name: name, Size: 1, Fill: new(byte)} }
	err := bundle.Write(t.Context(), io.Discard, &bundle.Manifest{Parts: []bundle.Part{part("app"), part("APP")}}, nil, nil)
	require.ErrorIs(t, err, bundle.ErrManifest)
	p := part("app")
	p.Extra = map[string]json.RawMessage{"x": json.RawMessage("{")}
	_, err = (&bundle.Manifest{Parts: []bundle.Part{p}}).MarshalJSON()
	require.ErrorIs(t, err, bundle.ErrManifest)
}
