package bundle_test

import (
	"archive/zip"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"hash/crc32"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/bundle/trust"
)

func noteKey(t testing.TB, name string) *trust.Signer {
	private, _, err := trust.GenerateKey(rand.Reader, name)
	require.NoError(t, err)
	s, err := trust.ParseSigner(private)
	require.NoError(t, err)
	return s
}

// anchor returns one whose release keys are these.
func anchor(t testing.TB, threshold int, change func(*trust.Record), keys ...*trust.Signer) *trust.Anchor {
	root := noteKey(t, "root")
	r := trust.Record{Version: 1, SecurityStep: 100, Root: trust.Role{Threshold: 1, Keys: []trust.Key{root.Key()}}, Release: trust.Role{Threshold: threshold}}
	for _, k := range keys {
		r.Release.Keys = append(r.Release.Keys, k.Key())
	}
	if change != nil {
		change(&r)
	}
	text, err := r.Text()
	require.NoError(t, err)
	n := trust.Note{Text: text}
	require.NoError(t, n.Sign(root))
	a, err := trust.Open(n.Bytes())
	require.NoError(t, err)
	return a
}

// noted returns a small bundle.
func noted(t testing.TB, version string, security uint64, o *bundle.WriteOptions) []byte {
	var b bytes.Buffer
	m := &bundle.Manifest{Platform: "p", Version: version, Security: security, Parts: []bundle.Part{{Name: "a", Src: "a"}, {Name: "b", Src: "b"}}}
	files := map[string]bundle.File{"a": bytes.NewReader([]byte("a of " + version)), "b": bytes.NewReader([]byte("b of " + version))}
	require.NoError(t, bundle.Write(t.Context(), &b, m, files, o))
	return b.Bytes()
}

// requireReason wants an error that says why.
func requireReason(t *testing.T, err error, format string, args ...any) {
	t.Helper()
	var e *bundle.Error
	require.ErrorAs(t, err, &e, format, args)
	for _, is := range []error{bundle.ErrTruncated, bundle.ErrNotZip, bundle.ErrFormat, bundle.ErrTrailing, bundle.ErrHeaderTooLong, bundle.ErrMismatch,
		bundle.ErrCompressed, bundle.ErrStreamed, bundle.ErrZip64, bundle.ErrEncrypted, bundle.ErrDuplicate, bundle.ErrName, bundle.ErrNoManifest,
		bundle.ErrExtraEntry, bundle.ErrMissing, bundle.ErrManifest, bundle.ErrNoDigest, bundle.ErrSize, bundle.ErrCRC, bundle.ErrTooLarge,
		bundle.ErrDigest, bundle.ErrUnsigned, bundle.ErrSignature, bundle.ErrCorrupt, bundle.ErrIndex, bundle.ErrUnsupported} {
		if errors.Is(err, is) {
			return
		}
	}
	require.Fail(t, "no typed reason", append([]any{"%v: " + format, err}, args...)...)
}

func TestNote(t *testing.T) {
	k, k2, stranger := noteKey(t, "release"), noteKey(t, "second"), noteKey(t, "stranger")
	a := anchor(t, 1, nil, k, k2)
	b := noted(t, "1", 7, &bundle.WriteOptions{NoteKeys: []*trust.Signer{k}})
	r, err := (&bundle.Policy{Trust: a}).Verify(t.Context(), bytes.NewReader(b))
	require.NoError(t, err)
	require.Equal(t, []string{"note " + k.Key().ID()}, r.Info().SignedBy)
	require.False(t, r.Info().Unsigned)
	require.Equal(t, uint64(100), r.Info().SecurityStep, "for the device to hold against its floor")
	require.Empty(t, r.Attrs(), "a note is no attribute, and nobody carries it over to another manifest")
	require.Equal(t, b, noted(t, "1", 7, &bundle.WriteOptions{NoteKeys: []*trust.Signer{k}}), "deterministic")

	for name, c := range map[string]struct {
		b    []byte
		want error
	}{
		"no note":  {noted(t, "1", 7, nil), bundle.ErrUnsigned},
		"stranger": {noted(t, "1", 7, &bundle.WriteOptions{NoteKeys: []*trust.Signer{stranger}}), trust.ErrUnknownKey},
		"attribute of that name": {noted(t, "1", 7, &bundle.WriteOptions{
			Attrs: map[string]json.RawMessage{"note": json.RawMessage(`"hello"`)}}), bundle.ErrUnsigned},
		"sigs only": {noted(t, "1", 7, &bundle.WriteOptions{Keys: []crypto.Signer{newKey(t)}}), bundle.ErrUnsigned},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := (&bundle.Policy{Trust: a}).Open(t.Context(), bytes.NewReader(c.b))
			require.ErrorIs(t, err, c.want)
			require.ErrorIs(t, err, bundle.ErrUnsigned)
			require.ErrorIs(t, err, ota.ErrUnverified)
			var e *bundle.Error
			require.ErrorAs(t, err, &e)
			code, _ := e.MongooseCode()
			require.Equal(t, -18, code)
			r, err := (&bundle.Policy{Trust: a, AllowUnsigned: true}).Verify(t.Context(), bytes.NewReader(c.b))
			require.NoError(t, err)
			require.True(t, r.Info().Unsigned)
		})
	}
	_, err = (&bundle.Policy{Trust: anchor(t, 2, nil, k, k2)}).Open(t.Context(), bytes.NewReader(b))
	require.ErrorIs(t, err, bundle.ErrUnsigned, "one of two")
}

// If there are keys of both kinds, both must have signed.
func TestNoteAndSig(t *testing.T) {
	k, s := noteKey(t, "release"), newKey(t)
	both := &bundle.Policy{Trust: anchor(t, 1, nil, k), Keys: []*ecdsa.PublicKey{&s.PublicKey}}
	note, sig := []*trust.Signer{k}, []crypto.Signer{s}
	r, err := both.Verify(t.Context(), bytes.NewReader(noted(t, "1", 0, &bundle.WriteOptions{NoteKeys: note, Keys: sig})))
	require.NoError(t, err)
	require.Len(t, r.Info().SignedBy, 2)
	for _, o := range []*bundle.WriteOptions{{NoteKeys: note}, {Keys: sig}, {}} {
		b := noted(t, "1", 0, o)
		_, err := both.Open(t.Context(), bytes.NewReader(b))
		require.ErrorIs(t, err, bundle.ErrUnsigned)
		loose := *both
		loose.AllowUnsigned = true
		r, err := loose.Verify(t.Context(), bytes.NewReader(b))
		require.NoError(t, err)
		require.True(t, r.Info().Unsigned, "half of what is required is nothing")
		require.Empty(t, r.Info().SignedBy)
	}
	// A wrong one is refused even where unsigned bundles are not.
	loose := *both
	loose.AllowUnsigned = true
	_, err = loose.Open(t.Context(), bytes.NewReader(noted(t, "1", 0, &bundle.WriteOptions{NoteKeys: note, Keys: []crypto.Signer{newKey(t)}})))
	require.ErrorIs(t, err, bundle.ErrSignature)
	b := noted(t, "1", 0, &bundle.WriteOptions{NoteKeys: note, Keys: sig})
	i := bytes.Index(b, []byte("— release "))
	for n := range 2 { // in both headers
		j := i + 40 + n*(bytes.LastIndex(b, []byte("— release "))-i)
		b[j] = b[j]%('Z'-'A') + 'A'
	}
	_, err = loose.Open(t.Context(), bytes.NewReader(b))
	require.ErrorIs(t, err, bundle.ErrSignature)
	require.ErrorIs(t, err, trust.ErrSignature)
}

func TestNotePolicy(t *testing.T) {
	k := noteKey(t, "release")
	sum := sha256.Sum256([]byte("slotota test release"))
	published, err := trust.NewSigner("ci", ed25519.NewKeyFromSeed(sum[:]))
	require.NoError(t, err)
	b := noted(t, "1", 3, &bundle.WriteOptions{NoteKeys: []*trust.Signer{k, published}})
	open := func(p *bundle.Policy) error {
		_, err := p.Open(t.Context(), bytes.NewReader(b))
		return err
	}
	require.ErrorIs(t, open(&bundle.Policy{}), bundle.ErrPolicy, "nobody is trusted")
	require.ErrorIs(t, open(&bundle.Policy{Trust: &trust.Anchor{}}), bundle.ErrPolicy)
	require.ErrorIs(t, open(&bundle.Policy{Trust: &trust.Anchor{}, AllowUnsigned: true}), bundle.ErrPolicy)
	known := anchor(t, 1, nil, k, published)
	require.ErrorIs(t, open(&bundle.Policy{Trust: known}), bundle.ErrPolicy, "everybody is trusted")
	require.NoError(t, open(&bundle.Policy{Trust: known, AllowTestKeys: true}))

	min := func(v uint64) *bundle.Policy {
		return &bundle.Policy{Trust: anchor(t, 1, func(r *trust.Record) { r.SecurityMin = v }, k)}
	}
	require.NoError(t, open(min(3)))
	require.ErrorIs(t, open(min(4)), ota.ErrRollback)

	end := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	short := anchor(t, 1, func(r *trust.Record) { r.Expires = end }, k)
	for name, c := range map[string]struct {
		clock func() (time.Time, bool)
		want  error
	}{
		"no clock":           {nil, nil},
		"clock that is lost": {func() (time.Time, bool) { return end.AddDate(10, 0, 0), false }, nil},
		"before":             {func() (time.Time, bool) { return end.Add(-time.Nanosecond), true }, nil},
		"at":                 {func() (time.Time, bool) { return end, true }, trust.ErrExpired},
		"ten years after":    {func() (time.Time, bool) { return end.AddDate(10, 0, 0), true }, trust.ErrExpired},
		"ten years before":   {func() (time.Time, bool) { return end.AddDate(-10, 0, 0), true }, nil},
	} {
		err := open(&bundle.Policy{Trust: short, Clock: c.clock})
		require.ErrorIs(t, err, c.want, name)
		if c.want != nil {
			require.ErrorIs(t, err, bundle.ErrUnsigned, name)
		}
	}
}

// Whatever byte is changed, the bundle is refused, and for a reason.
func TestNoteEveryByte(t *testing.T) {
	k, k2 := noteKey(t, "release"), noteKey(t, "second")
	p := &bundle.Policy{Trust: anchor(t, 2, nil, k, k2)}
	b := noted(t, "1", 1, &bundle.WriteOptions{NoteKeys: []*trust.Signer{k, k2}})
	_, err := p.Verify(t.Context(), bytes.NewReader(b))
	require.NoError(t, err)
	values := []byte{1, 0x20, 0x80}
	if !testing.Short() {
		values = []byte{1, 2, 4, 8, 0x10, 0x20, 0x40, 0x80, 0xff}
	}
	for i := range b {
		for _, x := range values {
			c := slices.Clone(b)
			c[i] ^= x
			_, err := p.Verify(t.Context(), bytes.NewReader(c))
			requireReason(t, err, "byte %d ^ %#x", i, x)
		}
		_, err := p.Verify(t.Context(), bytes.NewReader(b[:i]))
		requireReason(t, err, "cut at %d", i)
	}
}

// Of the parts, manifests and notes of two bundles only those of one fit together.
func TestMixAndMatch(t *testing.T) {
	k := noteKey(t, "release")
	p := &bundle.Policy{Trust: anchor(t, 1, nil, k)}
	type pieces struct{ extra, manifest, a, b []byte }
	var of [2]pieces
	for i := range of {
		z := noted(t, string(rune('1'+i)), 1, &bundle.WriteOptions{NoteKeys: []*trust.Signer{k}})
		r, err := zip.NewReader(bytes.NewReader(z), int64(len(z)))
		require.NoError(t, err)
		read := func(n int) []byte {
			f, err := r.File[n].Open()
			require.NoError(t, err)
			var b bytes.Buffer
			_, err = b.ReadFrom(f)
			require.NoError(t, err)
			return b.Bytes()
		}
		of[i] = pieces{r.File[0].Extra, read(0), read(1), read(2)}
	}
	accepted := 0
	for mix := range 16 {
		pick := func(bit int) pieces { return of[mix>>bit&1] }
		z := storedZip(t, pick(0).extra, []namedFile{{"manifest.json", pick(1).manifest}, {"a", pick(2).a}, {"b", pick(3).b}})
		_, err := p.Verify(t.Context(), bytes.NewReader(z))
		if mix == 0 || mix == 15 {
			require.NoError(t, err)
			accepted++
			continue
		}
		requireReason(t, err, "mix %04b", mix)
		if mix&1 != mix>>1&1 {
			require.ErrorIs(t, err, trust.ErrText, "a note about the other manifest")
		}
	}
	require.Equal(t, 2, accepted)
}

type namedFile struct {
	name string
	data []byte
}

// storedZip makes an archive in the way that the format demands.
func storedZip(t *testing.T, extra []byte, files []namedFile) []byte {
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for i, f := range files {
		h := &zip.FileHeader{Name: f.name, Method: zip.Store, CRC32: crc32.ChecksumIEEE(f.data), CompressedSize64: uint64(len(f.data)), UncompressedSize64: uint64(len(f.data)), ReaderVersion: 20, CreatorVersion: 20}
		if i == 0 {
			h.Extra = extra
		}
		e, err := w.CreateRaw(h)
		require.NoError(t, err)
		_, err = e.Write(f.data)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

// What fits into the 512 bytes that devices read of a directory entry.
func TestNoteCapacity(t *testing.T) {
	name := strings.Repeat("n", 18)
	note := func(n int) (keys []*trust.Signer) {
		for range n {
			keys = append(keys, noteKey(t, name))
		}
		return keys
	}
	sig := func(n int) (keys []crypto.Signer) {
		for range n {
			keys = append(keys, newKey(t))
		}
		return keys
	}
	for _, c := range []struct {
		notes, sigs int
		fits        bool
	}{{3, 0, true}, {4, 0, false}, {2, 1, true}, {3, 1, false}, {1, 2, true}, {2, 2, false}, {1, 3, false}, {0, 4, true}} {
		m := &bundle.Manifest{Platform: "p", Version: strings.Repeat("x", 60000), Parts: []bundle.Part{{Name: "a", Src: "a"}}}
		var b bytes.Buffer
		err := bundle.Write(t.Context(), &b, m, map[string]bundle.File{"a": bytes.NewReader([]byte("a"))}, &bundle.WriteOptions{NoteKeys: note(c.notes), Keys: sig(c.sigs)})
		if !c.fits {
			require.ErrorIs(t, err, bundle.ErrHeaderTooLong, "%+v", c)
			require.Zero(t, b.Len(), "before anything is written")
			continue
		}
		require.NoError(t, err, "%+v", c)
		z, err := zip.NewReader(bytes.NewReader(b.Bytes()), int64(b.Len()))
		require.NoError(t, err)
		require.LessOrEqual(t, 46+len("manifest.json")+len(z.File[0].Extra), 512)
	}
}

func TestResignNote(t *testing.T) {
	k, k2, s := noteKey(t, "release"), noteKey(t, "second"), newKey(t)
	resign := func(b []byte, o *bundle.ResignOptions) []byte {
		var out bytes.Buffer
		require.NoError(t, bundle.Resign(t.Context(), &out, bytes.NewReader(b), o))
		return out.Bytes()
	}
	plain := noted(t, "1", 1, nil)
	at := noted(t, "1", 1, &bundle.WriteOptions{NoteKeys: []*trust.Signer{k}})
	require.Equal(t, at, resign(plain, &bundle.ResignOptions{NoteKeys: []*trust.Signer{k}}))
	require.Equal(t, at, resign(at, &bundle.ResignOptions{NoteKeys: []*trust.Signer{k}}), "replaced")
	require.Equal(t, plain, resign(at, &bundle.ResignOptions{Remove: []string{"release"}}))

	// Made elsewhere.
	r, err := (&bundle.Policy{AllowUnsigned: true}).Verify(t.Context(), bytes.NewReader(plain))
	require.NoError(t, err)
	n := trust.Note{Text: trust.ManifestText(r.Manifest().Raw())}
	require.NoError(t, n.Sign(k))
	require.Equal(t, at, resign(plain, &bundle.ResignOptions{NoteLines: n.Signatures}))

	three := resign(resign(at, &bundle.ResignOptions{Keys: []crypto.Signer{nil, s}}), &bundle.ResignOptions{NoteKeys: []*trust.Signer{k2}})
	p := &bundle.Policy{Trust: anchor(t, 2, nil, k, k2), Keys: []*ecdsa.PublicKey{nil, &s.PublicKey}}
	r, err = p.Verify(t.Context(), bytes.NewReader(three))
	require.NoError(t, err)
	require.Len(t, r.Info().SignedBy, 3)
	require.Equal(t, at, resign(three, &bundle.ResignOptions{Remove: []string{"sig1", k2.Key().ID()}}))

	z, err := zip.NewReader(bytes.NewReader(three), int64(len(three)))
	require.NoError(t, err)
	got, err := bundle.Note(z.File[0].Extra[4:])
	require.NoError(t, err)
	require.Len(t, got.Signatures, 2)
	got, err = bundle.Note([]byte(`{"note":"hello"}`))
	require.NoError(t, err)
	require.Nil(t, got)
	_, err = bundle.Note([]byte(`{"note":"slotota bundle v1\nx"}`))
	require.ErrorIs(t, err, bundle.ErrSignature)
	_, err = bundle.Note([]byte(`{"note"`))
	require.ErrorIs(t, err, bundle.ErrFormat)

	// A note that a tool left beside a new manifest does not stay.
	zs, err := zip.NewReader(bytes.NewReader(noted(t, "2", 1, nil)), int64(len(noted(t, "2", 1, nil))))
	require.NoError(t, err)
	var files []namedFile
	for _, f := range zs.File {
		rc, err := f.Open()
		require.NoError(t, err)
		var b bytes.Buffer
		_, err = b.ReadFrom(rc)
		require.NoError(t, err)
		files = append(files, namedFile{f.Name, b.Bytes()})
	}
	za, err := zip.NewReader(bytes.NewReader(at), int64(len(at)))
	require.NoError(t, err)
	stale := storedZip(t, za.File[0].Extra, files)
	fresh := resign(stale, &bundle.ResignOptions{NoteKeys: []*trust.Signer{k2}})
	r, err = (&bundle.Policy{Trust: anchor(t, 1, nil, k, k2)}).Verify(t.Context(), bytes.NewReader(fresh))
	require.NoError(t, err)
	require.Equal(t, []string{"note " + k2.Key().ID()}, r.Info().SignedBy)

	// Archives of build systems say who made them. Signed ones do not: every byte counts.
	unix := slices.Clone(plain)
	for i := bytes.Index(unix, []byte("PK\x01\x02")); i >= 0 && i < len(unix); {
		copy(unix[i+4:], []byte{20, 3})
		copy(unix[i+38:], []byte{0, 0, 0xa4, 0x81}) // a regular file, 0644
		j := bytes.Index(unix[i+4:], []byte("PK\x01\x02"))
		if j < 0 {
			break
		}
		i += 4 + j
	}
	_, err = (&bundle.Policy{AllowUnsigned: true}).Verify(t.Context(), bytes.NewReader(unix))
	require.NoError(t, err)
	require.Equal(t, at, resign(unix, &bundle.ResignOptions{NoteKeys: []*trust.Signer{k}}))

	hello := noted(t, "1", 1, &bundle.WriteOptions{Attrs: map[string]json.RawMessage{"note": json.RawMessage(`"hello"`)}})
	for name, c := range map[string]struct {
		b    []byte
		o    *bundle.ResignOptions
		want error
	}{
		"nothing":      {plain, nil, bundle.ErrPolicy},
		"no such name": {at, &bundle.ResignOptions{Remove: []string{"sig0"}}, ota.ErrInvalid},
		"attribute":    {hello, &bundle.ResignOptions{NoteKeys: []*trust.Signer{k}}, bundle.ErrFormat},
		"nil key":      {plain, &bundle.ResignOptions{NoteKeys: []*trust.Signer{nil}}, trust.ErrKey},
		"no line":      {plain, &bundle.ResignOptions{NoteLines: []trust.Signature{{Name: "a\nb", Hash: 1, Sig: []byte{1}}}}, bundle.ErrSignature},
		"too many":     {three, &bundle.ResignOptions{NoteKeys: []*trust.Signer{noteKey(t, "x")}}, bundle.ErrHeaderTooLong},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			err := bundle.Resign(t.Context(), &out, bytes.NewReader(c.b), c.o)
			require.ErrorIs(t, err, c.want)
			require.Zero(t, out.Len())
		})
	}

	// Attributes cannot pass for notes, nor stand where one goes.
	m := r.Manifest()
	fs := map[string]bundle.File{"a": bytes.NewReader([]byte("a")), "b": bytes.NewReader([]byte("b"))}
	text, err := json.Marshal(string(n.Bytes()))
	require.NoError(t, err)
	for _, o := range []*bundle.WriteOptions{
		{Attrs: map[string]json.RawMessage{"note": text}},
		{Attrs: map[string]json.RawMessage{"note": json.RawMessage(`1`)}, NoteKeys: []*trust.Signer{k}},
		{Attrs: map[string]json.RawMessage{"Note": json.RawMessage(`1`)}},
	} {
		require.ErrorIs(t, bundle.Write(t.Context(), &bytes.Buffer{}, m, fs, o), bundle.ErrFormat)
	}
	require.ErrorIs(t, bundle.Write(t.Context(), &bytes.Buffer{}, m, fs, &bundle.WriteOptions{NoteKeys: []*trust.Signer{nil}}), trust.ErrKey)
}
