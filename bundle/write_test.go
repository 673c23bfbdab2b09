package bundle_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return k
}

func p384(t testing.TB) *ecdsa.PublicKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	require.NoError(t, err)
	return &k.PublicKey
}

// sign returns an extra field with a signature as number 0.
func sign(t testing.TB, k *ecdsa.PrivateKey, manifest string) string {
	t.Helper()
	sum := sha256.Sum256([]byte(manifest))
	sig, err := ecdsa.SignASN1(rand.Reader, k, sum[:])
	require.NoError(t, err)
	body := `{"sig0":"` + base64.StdEncoding.EncodeToString(sig) + `"}`
	return string(le.AppendUint16([]byte("\x3a\x29"), uint16(len(body)))) + body
}

// smallParts returns the manifest and the files of small.zip.
func smallParts(t testing.TB) (*bundle.Manifest, map[string]bundle.File) {
	t.Helper()
	got, b, err := content(t.Context(), lax, bytes.NewReader(load(t, "small.zip")))
	require.NoError(t, err)
	return b.Manifest(), map[string]bundle.File{
		"app.bin": strings.NewReader(got["app"]),
		"fs.img":  strings.NewReader(got["fs"]),
	}
}

func TestWriteAsTheGenuineTool(t *testing.T) {
	m, files := smallParts(t)
	var b bytes.Buffer
	require.NoError(t, bundle.Write(t.Context(), &b, m, files, nil))
	require.Equal(t, load(t, "small.zip"), b.Bytes(), "byte for byte")

	// From scratch, with wrong sizes and digests in the description.
	for i := range m.Parts {
		if m.Parts[i].Src != "" {
			m.Parts[i].Size, m.Parts[i].SHA1, m.Parts[i].SHA256 = 1, nil, new([32]byte)
		}
	}
	b.Reset()
	require.NoError(t, bundle.Write(t.Context(), &b, m, files, nil))
	require.Equal(t, load(t, "small.zip"), b.Bytes())

	// The signed one has the same manifest and layout; its files are in random order.
	m.Extra = map[string]json.RawMessage{"shelly_hk_model": []byte(`"ShellyX"`), "num": []byte("5")}
	m.Parts[0], m.Parts[1] = m.Parts[1], m.Parts[0]
	b.Reset()
	k := newKey(t)
	o := &bundle.WriteOptions{Keys: []crypto.Signer{k, nil, k}, Attrs: map[string]json.RawMessage{"note": []byte(` "hello"`)}}
	require.NoError(t, bundle.Write(t.Context(), &b, m, files, o))
	require.True(t, bytes.Contains(b.Bytes(), []byte(`{"note":"hello","sig0":"ME`)))
	require.Equal(t, 2, bytes.Count(b.Bytes(), []byte(`,"sig2":"ME`)), "in local header and directory")
	signed, err := lax.Open(t.Context(), bytes.NewReader(load(t, "signed.zip")))
	require.NoError(t, err)
	mine, err := lax.Open(t.Context(), bytes.NewReader(b.Bytes()))
	require.NoError(t, err)
	require.JSONEq(t, string(signed.Manifest().Raw()), string(mine.Manifest().Raw()))
	require.Len(t, mine.Manifest().Raw(), len(signed.Manifest().Raw()))
}

func TestWriteAndRead(t *testing.T) {
	k0, k1 := newKey(t), newKey(t)
	fill := byte(0)
	m := &bundle.Manifest{
		Name: `a "name" <&> ü`, Platform: "p", Version: "1", BuildID: "id", BuildTimestamp: "2025-01-01T00:00:00Z", Description: "d",
		Security: 7,
		Parts: []bundle.Part{
			{Name: "z", Src: "z.bin", Extra: map[string]json.RawMessage{"ptn": []byte(`"z_0"`), "own": []byte(`{ "x" : [1, 2] }`)}},
			{Name: "a", Src: "a.bin", Type: "app", NoUpdate: true},
			{Name: "f", Size: 5, Fill: &fill},
		},
		Extra: map[string]json.RawMessage{"ota": []byte(`{"x-later":true,"security":3}`)},
	}
	files := map[string]bundle.File{"z.bin": strings.NewReader("zzz"), "a.bin": strings.NewReader("aaa")}
	o := &bundle.WriteOptions{Keys: []crypto.Signer{k0, k1}, Dir: "app-1.0+x"}
	write := func() []byte {
		var b bytes.Buffer
		require.NoError(t, bundle.Write(t.Context(), &b, m, files, o))
		return b.Bytes()
	}
	file := write()
	require.Equal(t, file, write(), "deterministic, signatures included")
	sameAsStandardLibrary(t, file)

	p := &bundle.Policy{Keys: []*ecdsa.PublicKey{&k0.PublicKey, &k1.PublicKey}}
	got, b, err := content(t.Context(), p, bytes.NewReader(file))
	require.NoError(t, err)
	require.Equal(t, map[string]string{"z": "zzz", "f": "\x00\x00\x00\x00\x00"}, got)
	require.Len(t, b.Info().SignedBy, 2)
	require.Equal(t, uint64(7), b.Info().Security)
	require.Equal(t, uint64(7), b.Manifest().Security)
	require.JSONEq(t, `{"x-later":true,"security":7}`, string(b.Manifest().Extra["ota"]))
	require.Equal(t, m.Name, b.Info().Name)
	require.Equal(t, "a", b.Manifest().Parts[0].Name, "sorted, as the genuine writer does")
	require.JSONEq(t, `{"x":[1,2]}`, string(b.Manifest().Part("z").Extra["own"]))
	require.Nil(t, b.Manifest().Part("x"))
	require.Equal(t, sum1("aaa"), hexOf(b.Manifest().Part("a").SHA1[:]))

	// Eight signatures fit a local header, but not the directory of devices.
	o.Keys = []crypto.Signer{k0, k0, k0, k0}
	require.NotEmpty(t, write())
	o.Keys = []crypto.Signer{k0, k0, k0, k0, k0}
	require.ErrorIs(t, bundle.Write(t.Context(), io.Discard, m, files, o), bundle.ErrHeaderTooLong)
}

// Security is what counts, also if it is lowered to 0.
func TestSecurityLowered(t *testing.T) {
	for own, want := range map[string]string{
		`{"security":3}`: "",
		`{"x-later":[1],"security":3,"x-also":{}}`: `{"x-later":[1],"x-also":{}}`,
		`{"security":0}`:   "",
		`{"x-later":true}`: `{"x-later":true}`,
		`{}`:               "",
	} {
		m, err := bundle.ParseManifest([]byte(`{"parts":{"a":{"size":1,"fill":0}},"ota":` + own + `}`))
		require.NoError(t, err)
		for _, v := range []uint64{5, 0} {
			m.Security = v
			var b bytes.Buffer
			require.NoError(t, bundle.Write(t.Context(), &b, m, nil, nil))
			r, err := lax.Verify(t.Context(), &b)
			require.NoError(t, err)
			require.Equal(t, v, r.Info().Security, own)
			if v == 0 && want == "" {
				require.NotContains(t, r.Manifest().Extra, "ota")
			} else if v == 0 {
				require.JSONEq(t, want, string(r.Manifest().Extra["ota"]))
			}
		}
		require.Equal(t, own, string(m.Extra["ota"]), "is not changed")
	}
	m := &bundle.Manifest{Parts: []bundle.Part{{Name: "a", Size: 1, Fill: new(byte)}}, Extra: map[string]json.RawMessage{"ota": []byte("5")}}
	require.ErrorIs(t, bundle.Write(t.Context(), io.Discard, m, nil, nil), bundle.ErrManifest)
}

// Two signatures by one key are not two.
func TestThresholdCountsKeys(t *testing.T) {
	k, other := newKey(t), newKey(t)
	p := &bundle.Policy{Keys: []*ecdsa.PublicKey{&k.PublicKey, &k.PublicKey, &other.PublicKey}, Threshold: 2}
	m := &bundle.Manifest{Parts: []bundle.Part{{Name: "a", Size: 1, Fill: new(byte)}}}
	for name, c := range map[string]struct {
		keys []crypto.Signer
		err  error
	}{
		"one key":          {[]crypto.Signer{k}, bundle.ErrUnsigned},
		"the same, twice":  {[]crypto.Signer{k, k}, bundle.ErrUnsigned},
		"two keys":         {[]crypto.Signer{k, nil, other}, nil},
		"two, and another": {[]crypto.Signer{k, k, other}, nil},
	} {
		var b bytes.Buffer
		require.NoError(t, bundle.Write(t.Context(), &b, m, nil, &bundle.WriteOptions{Keys: c.keys}))
		_, err := p.Open(t.Context(), &b)
		require.ErrorIs(t, err, c.err, name)
	}
}

// The unused bits at the end of base64 are 0 (RFC 4648, section 3.5).
func TestSignatureBase64(t *testing.T) {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
	k := newKey(t)
	p := &bundle.Policy{Keys: []*ecdsa.PublicKey{&k.PublicKey}}
	a := good()
	for {
		a.entries[0].extra = sign(t, k, a.entries[0].data)
		if strings.Contains(a.entries[0].extra, "=") { // the length of a signature varies
			break
		}
	}
	_, err := p.Open(t.Context(), bytes.NewReader(a.bytes()))
	require.NoError(t, err)
	head, tail, _ := strings.Cut(a.entries[0].extra, "=")
	last := strings.IndexByte(alphabet, head[len(head)-1])
	a.entries[0].extra = head[:len(head)-1] + alphabet[last+1:last+2] + "=" + tail
	_, err = p.Open(t.Context(), bytes.NewReader(a.bytes()))
	require.ErrorIs(t, err, bundle.ErrSignature)
}

func hexOf(b []byte) string {
	const digits = "0123456789abcdef"
	var s strings.Builder
	for _, c := range b {
		s.WriteByte(digits[c>>4])
		s.WriteByte(digits[c&15])
	}
	return s.String()
}

func TestWriteRefused(t *testing.T) {
	fill := byte(1)
	k := newKey(t)
	file := func() map[string]bundle.File {
		return map[string]bundle.File{"a.bin": strings.NewReader("a"), "b.bin": strings.NewReader("b")}
	}
	for name, c := range map[string]struct {
		change func(m *bundle.Manifest, files map[string]bundle.File, o *bundle.WriteOptions)
		err    error
	}{
		"no parts":     {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) { m.Parts = nil; clear(f) }, bundle.ErrManifest},
		"file missing": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) { delete(f, "b.bin") }, bundle.ErrMissing},
		"file extra":   {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) { f["c"] = f["a.bin"] }, bundle.ErrExtraEntry},
		"file empty": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			f["a.bin"] = strings.NewReader("")
		}, bundle.ErrManifest},
		"file too large": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) { f["a.bin"] = hugeFile{} }, bundle.ErrTooLarge},
		"file shared": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			m.Parts[1].Src = "a.bin"
			delete(f, "b.bin")
		}, bundle.ErrManifest},
		"name": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			m.Parts[1].Src = "b/b"
			f["b/b"] = f["b.bin"]
			delete(f, "b.bin")
		}, bundle.ErrName},
		"part name":     {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) { m.Parts[0].Name = "a b" }, bundle.ErrManifest},
		"part twice":    {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) { m.Parts[0].Name = "B" }, bundle.ErrManifest},
		"file and fill": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) { m.Parts[0].Fill = &fill }, bundle.ErrManifest},
		"bad extra": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			m.Extra = map[string]json.RawMessage{"x": []byte("{")}
		}, bundle.ErrManifest},
		"bad ota": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			m.Extra = map[string]json.RawMessage{"ota": []byte("1")}
			m.Security = 1
		}, bundle.ErrManifest},
		"injected": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			m.Extra = map[string]json.RawMessage{"x": []byte(`1,"name":"y"`)}
		}, bundle.ErrManifest},
		"too large": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			m.Description = strings.Repeat("x", 64<<10)
		}, bundle.ErrTooLarge},
		"directory": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) { o.Dir = "../x" }, bundle.ErrName},
		"nine keys": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			o.Keys = make([]crypto.Signer, 9)
		}, bundle.ErrPolicy},
		"P-384": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
			require.NoError(t, err)
			o.Keys = []crypto.Signer{k}
		}, bundle.ErrPolicy},
		"bad attribute": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			o.Attrs = map[string]json.RawMessage{"x": []byte("]")}
		}, bundle.ErrFormat},
		"large attribute": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			o.Attrs = map[string]json.RawMessage{"x": []byte(`"` + strings.Repeat("x", 70000) + `"`)}
		}, bundle.ErrHeaderTooLong},
		"failing key": {func(m *bundle.Manifest, f map[string]bundle.File, o *bundle.WriteOptions) {
			o.Keys = []crypto.Signer{failingKey{k}}
		}, os.ErrPermission},
	} {
		m := &bundle.Manifest{Parts: []bundle.Part{{Name: "a", Src: "a.bin"}, {Name: "b", Src: "b.bin"}}}
		files, o := file(), &bundle.WriteOptions{}
		c.change(m, files, o)
		var b bytes.Buffer
		err := bundle.Write(t.Context(), &b, m, files, o)
		require.ErrorIs(t, err, c.err, name)
		var e *bundle.Error
		require.ErrorAs(t, err, &e, name)
		require.Zero(t, b.Len(), "%s: nothing is written", name)
	}

	m := &bundle.Manifest{Parts: []bundle.Part{{Name: "a", Src: "a.bin"}, {Name: "b", Src: "b.bin"}}}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, bundle.Write(ctx, io.Discard, m, file(), nil), context.Canceled)
	files := file()
	files["a.bin"] = &changing{}
	require.ErrorIs(t, bundle.Write(t.Context(), io.Discard, m, files, nil), ota.ErrChanged)

	// Every failing write is reported.
	var whole bytes.Buffer
	require.NoError(t, bundle.Write(t.Context(), &whole, m, file(), nil))
	for i := range whole.Len() {
		w := &limited{n: i}
		require.ErrorIs(t, bundle.Write(t.Context(), w, m, file(), nil), errFull, "%d bytes", i)
	}
}

type hugeFile struct{}

func (hugeFile) ReadAt([]byte, int64) (int, error) { return 0, errors.New("read") }
func (hugeFile) Size() int64                       { return 1 << 32 }

// changing yields another byte on each read.
type changing struct{ b byte }

func (c *changing) Size() int64 { return 1 }
func (c *changing) ReadAt(p []byte, off int64) (int, error) {
	c.b++
	p[0] = c.b
	return 1, nil
}

var errFull = errors.New("full")

type limited struct{ n int }

func (l *limited) Write(p []byte) (int, error) {
	if l.n -= len(p); l.n < 0 {
		return 0, errFull
	}
	return len(p), nil
}

type failingKey struct{ crypto.Signer }

func (failingKey) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, os.ErrPermission
}

// Manifests of real firmware parse, keep everything, and come out the same.
func TestRealManifests(t *testing.T) {
	names, err := filepath.Glob("../../shared/mongoose/bundles/manifests/*.json")
	require.NoError(t, err)
	if len(names) == 0 {
		t.Skip("the collection of real manifests is not here")
	}
	require.Len(t, names, 12)
	for _, name := range names {
		b, err := os.ReadFile(name)
		require.NoError(t, err)
		m, err := bundle.ParseManifest(b)
		require.NoError(t, err, name)
		require.NotEmpty(t, m.Name)
		require.NotEmpty(t, m.BuildTimestamp)
		out, err := m.MarshalJSON()
		require.NoError(t, err)
		require.JSONEq(t, string(b), strings.ReplaceAll(string(out), `"update":true,`, ""), name)
	}
}
