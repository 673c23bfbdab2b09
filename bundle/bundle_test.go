package bundle_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

var (
	_  ota.Image = (*bundle.Reader)(nil)
	le           = binary.LittleEndian

	lax = &bundle.Policy{AllowUnsigned: true}
	old = &bundle.Policy{AllowUnsigned: true, AllowSHA1: true}
)

func load(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	require.NoError(t, err)
	return b
}

func key(t testing.TB, name string) *ecdsa.PublicKey {
	t.Helper()
	k, err := bundle.ParseKey(load(t, name))
	require.NoError(t, err)
	return k
}

// content reads all of a bundle.
func content(ctx context.Context, p *bundle.Policy, r io.Reader) (map[string]string, *bundle.Reader, error) {
	b, err := p.Open(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	got := map[string]string{}
	for {
		q, err := b.Next(ctx)
		if err == io.EOF {
			return got, b, nil
		}
		if err != nil {
			return got, b, err
		}
		data, err := io.ReadAll(q.Data)
		if err != nil {
			return got, b, err
		}
		if int64(len(data)) != q.Size {
			return got, b, fmt.Errorf("%d bytes in part %s instead of %d", len(data), q.Name, q.Size)
		}
		// What the consumer of an image does.
		if q.SHA256 != nil && sha256.Sum256(data) != *q.SHA256 {
			return got, b, ota.ErrDigest
		}
		got[q.Name] = string(data)
	}
}

// archive is a zip file in the making.
type archive struct {
	before  string
	entries []entry
	end     func(b []byte) []byte // changes the end record
}

type entry struct {
	name, data, extra string
	flags             uint16
	descriptor        string                // follows the data
	between           string                // follows that
	local, central    func([]byte)          // change the headers
	dir               func(b []byte) []byte // replaces the directory's entry
	noDir             bool
}

func (a *archive) bytes() []byte {
	b := []byte(a.before)
	var dir []byte
	n := 0
	for _, e := range a.entries {
		off := len(b)
		h := le.AppendUint32(nil, 0x04034b50)
		h = le.AppendUint16(h, 20)
		h = le.AppendUint16(h, e.flags)
		h = append(h, make([]byte, 6)...)
		h = le.AppendUint32(h, crc32.ChecksumIEEE([]byte(e.data)))
		h = le.AppendUint32(h, uint32(len(e.data)))
		h = le.AppendUint32(h, uint32(len(e.data)))
		h = le.AppendUint16(h, uint16(len(e.name)))
		h = le.AppendUint16(h, uint16(len(e.extra)))
		h = append(h, e.name+e.extra...)
		c := le.AppendUint32(nil, 0x02014b50)
		c = le.AppendUint16(c, 20)
		c = append(c, h[4:30]...)
		c = append(c, make([]byte, 10)...)
		c = le.AppendUint32(c, uint32(off))
		c = append(c, h[30:]...)
		if e.local != nil {
			e.local(h)
		}
		if e.central != nil {
			e.central(c)
		}
		if e.dir != nil {
			c = e.dir(c)
		}
		b = append(b, h...)
		b = append(b, e.data+e.descriptor+e.between...)
		if !e.noDir {
			dir = append(dir, c...)
			n++
		}
	}
	end := le.AppendUint32(nil, 0x06054b50)
	end = le.AppendUint32(end, 0)
	end = le.AppendUint16(end, uint16(n))
	end = le.AppendUint16(end, uint16(n))
	end = le.AppendUint32(end, uint32(len(dir)))
	end = le.AppendUint32(end, uint32(len(b)))
	end = le.AppendUint16(end, 0)
	if a.end != nil {
		end = a.end(end)
	}
	return slices.Concat(b, dir, end)
}

func sum1(s string) string   { h := sha1.Sum([]byte(s)); return hex.EncodeToString(h[:]) }
func sum256(s string) string { h := sha256.Sum256([]byte(s)); return hex.EncodeToString(h[:]) }

const (
	appData = "the application"
	fsData  = "the file system"
)

// plainManifest describes app.bin with appData and fs.img with fsData.
var plainManifest = fmt.Sprintf(`{"name":"n","platform":"p","version":"v","build_id":"b","parts":{`+
	`"app":{"src":"app.bin","size":%d,"cs_sha1":%q,"cs_sha256":%q},"fs":{"src":"fs.img","size":%d,"cs_sha256":%q}}}`,
	len(appData), sum1(appData), sum256(appData), len(fsData), sum256(fsData))

// good returns an archive that is accepted.
func good() *archive {
	return &archive{entries: []entry{
		{name: "manifest.json", data: plainManifest},
		{name: "app.bin", data: appData},
		{name: "fs.img", data: fsData},
	}}
}

// with returns good with a change.
func with(f func(a *archive)) *archive {
	a := good()
	f(a)
	return a
}

func TestRecordedBundles(t *testing.T) {
	app := string(load(t, "small.zip")[785+30+7:][:1500])
	fs, nvs := "hello fs image", string(bytes.Repeat([]byte{255}, 16384))
	require.Equal(t, "45786528e7cd670b64ba55eaa8b1b8ac4aa119c0b0d660da2b1212325df1df37", sum256(app))

	for _, name := range []string{"small.zip", "nofs.zip", "signed.zip", "compressed.zip"} {
		want := map[string]string{"app": app, "fs": fs, "nvs": nvs}
		if name == "nofs.zip" {
			delete(want, "fs")
		}
		file := load(t, name)
		for how, r := range map[string]io.Reader{
			"whole":      bytes.NewReader(file),
			"one byte":   iotest.OneByteReader(bytes.NewReader(file)),
			"half":       iotest.HalfReader(bytes.NewReader(file)),
			"data + EOF": iotest.DataErrReader(bytes.NewReader(file)),
		} {
			got, b, err := content(t.Context(), lax, r)
			require.NoError(t, err, "%s, %s", name, how)
			require.Equal(t, want, got, "%s, %s", name, how)
			i := b.Info()
			require.Equal(t, "demo esp32 1.2.3 20260101-000000/test", i.Name+" "+i.Platform+" "+i.Version+" "+i.BuildID)
			require.True(t, i.Unsigned)
			require.Empty(t, i.SignedBy)
			require.Len(t, i.Parts, len(want))
			for _, p := range i.Parts {
				require.Equal(t, int64(len(want[p.Name])), p.Size)
				require.Equal(t, sha256.Sum256([]byte(want[p.Name])), *p.SHA256)
			}
			_, err = b.Next(t.Context())
			require.Equal(t, io.EOF, err, "Next stays at the end")
		}
	}
}

func TestRecordedSignatures(t *testing.T) {
	k0, k2 := key(t, "k0.pub.pem"), key(t, "k2.pub.pem")
	const s0, s2 = "sig0 5e9f7fe4685bc5c1", "sig2 970ec7234fc26df0"
	for name, c := range map[string]struct {
		p    bundle.Policy
		file string
		want []string
		err  error
	}{
		"both":                        {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k0, nil, k2}}, want: []string{s0, s2}},
		"mask 5":                      {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k0, nil, k2}, Required: 5}, want: []string{s0, s2}},
		"mask 1":                      {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k0}, Required: 1}, want: []string{s0}},
		"mask 4":                      {p: bundle.Policy{Keys: []*ecdsa.PublicKey{nil, nil, k2}, Required: 4}, want: []string{s2}},
		"mask 7":                      {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k2, k0, k2}, Required: 3}, err: bundle.ErrSignature},
		"absent":                      {p: bundle.Policy{Keys: []*ecdsa.PublicKey{nil, k0}}, err: bundle.ErrUnsigned},
		"exchanged":                   {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k2, nil, k0}}, err: bundle.ErrSignature},
		"threshold 1 of 2, one wrong": {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k0, nil, k0}, Threshold: 1}, want: []string{s0}},
		"threshold 2 of 2":            {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k0, k2, k2}, Threshold: 2}, want: []string{s0, s2}},
		"threshold 2, one absent":     {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k0, k2}, Threshold: 2}, err: bundle.ErrUnsigned},
		"unsigned file":               {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k0}}, file: "small.zip", err: bundle.ErrUnsigned},
		"allowed, unsigned file":      {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k0}, AllowUnsigned: true}, file: "small.zip"},
		"allowed, too few":            {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k0, k2}, AllowUnsigned: true}},
		"allowed, wrong":              {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k2}, AllowUnsigned: true}, err: bundle.ErrSignature},
		"allowed, signed":             {p: bundle.Policy{Keys: []*ecdsa.PublicKey{k0}, AllowUnsigned: true}, want: []string{s0}},
	} {
		t.Run(name, func(t *testing.T) {
			c.p.AllowTestKeys = true
			if c.file == "" {
				c.file = "signed.zip"
			}
			b, err := c.p.Open(t.Context(), bytes.NewReader(load(t, c.file)))
			if c.err != nil {
				require.ErrorIs(t, err, c.err)
				require.ErrorIs(t, err, ota.ErrUnverified)
				return
			}
			require.NoError(t, err)
			require.Equal(t, c.want, b.Info().SignedBy)
			require.Equal(t, c.want == nil, b.Info().Unsigned)
			if c.file == "signed.zip" {
				require.Equal(t, `"hello"`, string(b.Attrs()["note"]))
				require.Len(t, b.Attrs(), 1)
				require.Equal(t, `"ShellyX"`, string(b.Manifest().Extra["shelly_hk_model"]))
				require.Equal(t, "5", string(b.Manifest().Extra["num"]))
			}
		})
	}
}

// A signed manifest without a SHA-256 protects nothing, whatever else is allowed.
func TestSignedNeedsSHA256(t *testing.T) {
	k := newKey(t)
	m := fmt.Sprintf(`{"parts":{"app":{"src":"app.bin","size":%d,"cs_sha1":%q}}}`, len(appData), sum1(appData))
	a := &archive{entries: []entry{{name: "manifest.json", data: m, extra: sign(t, k, m)}, {name: "app.bin", data: appData}}}
	for _, p := range []*bundle.Policy{
		{Keys: []*ecdsa.PublicKey{&k.PublicKey}},
		{Keys: []*ecdsa.PublicKey{&k.PublicKey}, AllowUnsigned: true, AllowSHA1: true},
	} {
		_, err := p.Open(t.Context(), bytes.NewReader(a.bytes()))
		require.ErrorIs(t, err, bundle.ErrNoDigest)
	}
}

func TestPolicyRefused(t *testing.T) {
	k, other := &newKey(t).PublicKey, &newKey(t).PublicKey
	for name, p := range map[string]bundle.Policy{
		"zero":                      {},
		"limits only":               {MaxManifest: 1000, MaxSize: 1000},
		"nil keys":                  {Keys: make([]*ecdsa.PublicKey, 3)},
		"SHA-1 without unsigned":    {Keys: []*ecdsa.PublicKey{k}, AllowSHA1: true},
		"required without key":      {Keys: []*ecdsa.PublicKey{k}, Required: 3},
		"required without any":      {AllowUnsigned: true, Required: 1},
		"threshold without any":     {AllowUnsigned: true, Threshold: 1},
		"threshold too high":        {Keys: []*ecdsa.PublicKey{k, other}, Threshold: 3},
		"threshold negative":        {Keys: []*ecdsa.PublicKey{k, other}, Threshold: -1},
		"threshold by one key":      {Keys: []*ecdsa.PublicKey{k, k}, Threshold: 2},
		"one key required twice":    {Keys: []*ecdsa.PublicKey{k, k}, Required: 3},
		"one key required, default": {Keys: []*ecdsa.PublicKey{k, k}},
		"nine keys":                 {Keys: append(make([]*ecdsa.PublicKey, 8), k)},
		"P-384":                     {Keys: []*ecdsa.PublicKey{p384(t)}},
		"empty key":                 {Keys: []*ecdsa.PublicKey{{}}},
		"test key 0":                {Keys: []*ecdsa.PublicKey{key(t, "k0.pub.pem")}},
		"test key 2":                {Keys: []*ecdsa.PublicKey{k, nil, key(t, "k2.pub.pem")}},
		"manifest limit":            {AllowUnsigned: true, MaxManifest: 1 << 20},
		"manifest limit negative":   {AllowUnsigned: true, MaxManifest: -1},
		"size limit negative":       {AllowUnsigned: true, MaxSize: -1},
	} {
		img, err := p.Image(t.Context(), iotest.ErrReader(errors.New("read")))
		require.ErrorIs(t, err, bundle.ErrPolicy, name)
		require.ErrorIs(t, err, ota.ErrInvalid, name)
		require.Nil(t, img, name)
	}
	_, err := (*bundle.Policy)(nil).Image(t.Context(), iotest.ErrReader(errors.New("read")))
	require.ErrorIs(t, err, bundle.ErrPolicy)
	p := bundle.Policy{Keys: []*ecdsa.PublicKey{k, k}, Threshold: 1}
	_, err = p.Open(t.Context(), iotest.ErrReader(os.ErrClosed))
	require.ErrorIs(t, err, os.ErrClosed, "a usable policy reads")
}

func TestParseKey(t *testing.T) {
	const k0 = "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEsyumZXUIZaCwG7Y/OBOK5U8VKmAXNxT4caiZHX9wUQC3BOaRuifFmS3Ty6kFdWvCoujL024SGmXWH06YVKJKwQ=="
	k, err := bundle.ParseKey([]byte(k0 + "\n"))
	require.NoError(t, err)
	require.True(t, k.Equal(key(t, "k0.pub.pem")))
	id, err := bundle.KeyID(k)
	require.NoError(t, err)
	require.Equal(t, "5e9f7fe4685bc5c19c58ded22bec56a62dd6dffd3ff24a9f24ee604ae3cd9403", id)

	pem := string(load(t, "k0.pub.pem"))
	for _, s := range []string{"", "x", k0[:100], k0[1:], k0[:80] + "AAAA" + k0[84:], strings.Replace(k0, "Q==", "R==", 1), pem + pem, pem[:60]} {
		_, err := bundle.ParseKey([]byte(s))
		require.ErrorIs(t, err, ota.ErrInvalid, s)
	}
	_, err = bundle.KeyID(p384(t))
	require.ErrorIs(t, err, ota.ErrInvalid)
	_, err = bundle.KeyID(nil)
	require.ErrorIs(t, err, ota.ErrInvalid)
}

// The parts that the caller does not read are checked by Next.
func TestSkippedParts(t *testing.T) {
	evil := with(func(a *archive) { a.entries[2].data = "The file system" }) // CRC-32 and size agree
	open := func(a *archive) *bundle.Reader {
		b, err := lax.Open(t.Context(), bytes.NewReader(a.bytes()))
		require.NoError(t, err)
		return b
	}

	b := open(good())
	for _, want := range []string{"app", "fs"} {
		p, err := b.Next(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, p.Name)
	}
	_, err := b.Next(t.Context())
	require.Equal(t, io.EOF, err)

	b = open(evil)
	_, err = b.Next(t.Context())
	require.NoError(t, err)
	p, err := b.Next(t.Context())
	require.NoError(t, err)
	_, err = b.Next(t.Context())
	require.ErrorIs(t, err, ota.ErrDigest)
	_, err = p.Data.Read(make([]byte, 1))
	require.Error(t, err)
	_, err = b.Next(t.Context())
	require.ErrorIs(t, err, ota.ErrDigest, "an error is final")

	_, err = lax.Verify(t.Context(), bytes.NewReader(evil.bytes()))
	require.ErrorIs(t, err, bundle.ErrDigest)
	b, err = lax.Verify(t.Context(), bytes.NewReader(good().bytes()))
	require.NoError(t, err)
	require.Equal(t, "n", b.Info().Name)

	// Read in part, then left: size and checksums still count.
	b = open(with(func(a *archive) { a.entries[1].data = "The application" }))
	p, err = b.Next(t.Context())
	require.NoError(t, err)
	_, err = io.ReadFull(p.Data, make([]byte, 3))
	require.NoError(t, err)
	_, err = b.Next(t.Context())
	require.ErrorIs(t, err, bundle.ErrDigest, "the SHA-1 is wrong")

	// Data of a part that is over: an error, not an early end.
	b = open(good())
	p, err = b.Next(t.Context())
	require.NoError(t, err)
	_, err = io.ReadFull(p.Data, make([]byte, 3))
	require.NoError(t, err)
	_, err = b.Next(t.Context())
	require.NoError(t, err)
	_, err = io.ReadAll(p.Data)
	require.Error(t, err)
}

// Wrong data is reported with the last byte, and again by Next for callers
// that do not look.
func TestErrorWithTheLastByte(t *testing.T) {
	a := with(func(a *archive) { a.entries[1].data = "The application" })
	b, err := lax.Open(t.Context(), bytes.NewReader(a.bytes()))
	require.NoError(t, err)
	p, err := b.Next(t.Context())
	require.NoError(t, err)
	buf := make([]byte, len(appData))
	_, err = io.ReadFull(p.Data, buf)
	require.NoError(t, err, "io.ReadFull drops it")
	_, err = p.Data.Read(buf)
	require.ErrorIs(t, err, bundle.ErrDigest)
	_, err = b.Next(t.Context())
	require.ErrorIs(t, err, bundle.ErrDigest)
}

// Who reads a part of a signed bundle has its SHA-256 to check; who has the bundle
// checked gets everything checked.
func TestSHA1BesideSHA256(t *testing.T) {
	k := newKey(t)
	p := &bundle.Policy{Keys: []*ecdsa.PublicKey{&k.PublicKey}}
	m := fmt.Sprintf(`{"parts":{"app":{"src":"app.bin","size":%d,"cs_sha1":%q,"cs_sha256":%q}}}`, len(appData), sum1(fsData), sum256(appData))
	a := &archive{entries: []entry{{name: "manifest.json", data: m, extra: sign(t, k, m)}, {name: "app.bin", data: appData}}}
	got, _, err := content(t.Context(), p, bytes.NewReader(a.bytes()))
	require.NoError(t, err)
	require.Equal(t, map[string]string{"app": appData}, got)
	_, err = p.Verify(t.Context(), bytes.NewReader(a.bytes()))
	require.ErrorIs(t, err, bundle.ErrDigest)
	require.ErrorContains(t, err, "SHA-1")

	// Everything is as it was where nobody has signed.
	a.entries[0].extra = ""
	_, _, err = content(t.Context(), lax, bytes.NewReader(a.bytes()))
	require.ErrorIs(t, err, bundle.ErrDigest)
}

func TestNoUpdate(t *testing.T) {
	m := fmt.Sprintf(`{"parts":{"boot":{"src":"boot.bin","size":%d,"cs_sha256":%q,"update":false},`+
		`"rf":{"size":4,"fill":0,"update":false},"nvs":{"size":3,"fill":7,"update":true}}}`, len(appData), sum256(appData))
	a := &archive{entries: []entry{{name: "manifest.json", data: m}, {name: "boot.bin", data: appData}}}
	got, b, err := content(t.Context(), lax, bytes.NewReader(a.bytes()))
	require.NoError(t, err)
	require.Equal(t, map[string]string{"nvs": "\a\a\a"}, got)
	require.Len(t, b.Info().Parts, 1)
	require.True(t, b.Manifest().Part("boot").NoUpdate)

	a.entries[1].data = "The application"
	_, _, err = content(t.Context(), lax, bytes.NewReader(a.bytes()))
	require.ErrorIs(t, err, bundle.ErrDigest, "it is checked although it is not installed")
}

func TestContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	b, err := lax.Open(ctx, bytes.NewReader(load(t, "small.zip")))
	require.NoError(t, err)
	p, err := b.Next(ctx)
	require.NoError(t, err)
	_, err = p.Data.Read(make([]byte, 10))
	require.NoError(t, err)
	cancel()
	_, err = p.Data.Read(make([]byte, 10))
	require.ErrorIs(t, err, context.Canceled)
	_, err = b.Next(t.Context())
	require.ErrorIs(t, err, context.Canceled, "an error is final")

	_, err = lax.Open(ctx, bytes.NewReader(load(t, "small.zip")))
	require.ErrorIs(t, err, context.Canceled)

	// In the constant data of a fill part, too.
	ctx, cancel = context.WithCancel(t.Context())
	b, err = lax.Open(ctx, bytes.NewReader(load(t, "small.zip")))
	require.NoError(t, err)
	for p == nil || p.Name != "nvs" {
		p, err = b.Next(ctx)
		require.NoError(t, err)
	}
	cancel()
	_, err = p.Data.Read(make([]byte, 10))
	require.ErrorIs(t, err, context.Canceled)
}

// The errors of the source come through.
func TestSourceErrors(t *testing.T) {
	file := load(t, "small.zip")
	broken := errors.New("broken")
	for i := range file {
		_, _, err := content(t.Context(), lax, io.MultiReader(bytes.NewReader(file[:i]), iotest.ErrReader(broken)))
		require.ErrorIs(t, err, broken, "after %d bytes", i)
		var e *bundle.Error
		require.ErrorAs(t, err, &e)
	}
	_, _, err := content(t.Context(), lax, io.MultiReader(bytes.NewReader(file), iotest.ErrReader(broken)))
	require.ErrorIs(t, err, broken, "instead of the end")
	_, err = lax.Open(t.Context(), readFunc(func([]byte) (int, error) { return 0, nil }))
	require.ErrorIs(t, err, io.ErrNoProgress)
	for _, n := range []int{-1, 1 << 20} {
		_, err = lax.Open(t.Context(), readFunc(func([]byte) (int, error) { return n, nil }))
		require.ErrorContains(t, err, "impossible count")
	}
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

func TestMongooseCode(t *testing.T) {
	for err, want := range map[error]int{
		bundle.ErrSignature: -18, bundle.ErrUnsigned: -18, bundle.ErrDigest: -12, bundle.ErrCRC: -11,
		bundle.ErrHeaderTooLong: -15, bundle.ErrManifest: -1, bundle.ErrZip64: -1,
	} {
		code, text := (&bundle.Error{Off: -1, Err: fmt.Errorf("%w: detail", err)}).MongooseCode()
		require.Equal(t, want, code, "%v", err)
		require.NotEmpty(t, text)
	}
	for text, a := range map[string]*archive{
		"Extra file in bundle":                    with(func(a *archive) { a.entries = append(a.entries, entry{name: "x", data: "x"}) }),
		"File size mismatch":                      with(func(a *archive) { a.entries[1].data += "x" }),
		"Expected manifest, found something else": with(func(a *archive) { a.entries = a.entries[1:] }),
		"Failed to parse manifest":                {entries: []entry{{name: "manifest.json", data: "{"}}},
		"Required manifest field missing":         {entries: []entry{{name: "manifest.json", data: "{}"}}},
		"Invalid checksum":                        with(func(a *archive) { a.entries[1].data = "The application" }),
		"Archived file size is unknown": with(func(a *archive) {
			a.entries[1].flags = 8
			a.entries[1].local = func(h []byte) { clear(h[18:26]) }
		}),
		"Invalid file checksum format": {entries: []entry{{name: "manifest.json",
			data: `{"parts":{"a":{"src":"a","size":1,"cs_sha1":"zz"}}}`}}},
	} {
		_, _, err := content(t.Context(), lax, bytes.NewReader(a.bytes()))
		var e interface{ MongooseCode() (int, string) }
		require.ErrorAs(t, &ota.Error{Op: "update", Slot: ota.NoSlot, Off: -1, Err: err}, &e, text)
		_, got := e.MongooseCode()
		require.Equal(t, text, got, "%v", err)
	}
}
