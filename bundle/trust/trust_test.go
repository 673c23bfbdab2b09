package trust

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math/big"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/mod/sumdb/note"

	"github.com/slotota/ota"
)

func newSigner(t testing.TB, name string) *Signer {
	private, k, err := GenerateKey(rand.Reader, name)
	require.NoError(t, err)
	s, err := ParseSigner(private)
	require.NoError(t, err)
	require.Equal(t, k, s.Key())
	return s
}

// team is a root role of three, two of whom must sign, and a release role of two.
type team struct {
	root, release []*Signer
	rec           Record
}

func newTeam(t testing.TB) *team {
	m := &team{}
	for _, n := range []string{"alice", "bob", "carol"} {
		m.root = append(m.root, newSigner(t, n))
	}
	for _, n := range []string{"ci", "lead"} {
		m.release = append(m.release, newSigner(t, n))
	}
	m.rec = Record{Version: 1, SecurityStep: 100, Root: role(2, m.root...), Release: role(1, m.release...)}
	return m
}

func role(threshold int, keys ...*Signer) (r Role) {
	r.Threshold = threshold
	for _, k := range keys {
		r.Keys = append(r.Keys, k.Key())
	}
	return r
}

func sign(t testing.TB, text string, keys ...*Signer) []byte {
	n := Note{Text: text}
	require.NoError(t, n.Sign(keys...))
	return n.Bytes()
}

func signRecord(t testing.TB, r Record, keys ...*Signer) []byte {
	text, err := r.Text()
	require.NoError(t, err)
	return sign(t, text, keys...)
}

func (m *team) open(t testing.TB) *Anchor {
	a, err := Open(signRecord(t, m.rec, m.root[:2]...))
	require.NoError(t, err)
	return a
}

func (m *team) next() Record {
	r := m.rec
	r.Version++
	return r
}

// Project Wycheproof knows the ways in which verifiers were wrong.
func TestWycheproof(t *testing.T) {
	b, err := os.ReadFile("testdata/wycheproof/ed25519.json")
	require.NoError(t, err)
	var tests []struct {
		ID                            int
		PK, Msg, Sig, Result, Comment string
	}
	require.NoError(t, json.Unmarshal(b, &tests))
	require.Len(t, tests, 151)
	valid := 0
	for _, tt := range tests {
		pub, err := hex.DecodeString(tt.PK)
		require.NoError(t, err)
		msg, err := hex.DecodeString(tt.Msg)
		require.NoError(t, err)
		sig, err := hex.DecodeString(tt.Sig)
		require.NoError(t, err)
		k, err := NewKey("k", pub)
		require.NoError(t, err)
		require.Equal(t, tt.Result == "valid", k.Verify(msg, sig), "%d %s", tt.ID, tt.Comment)
		if tt.Result == "valid" {
			valid++
		}
	}
	require.Equal(t, 88, valid)
}

// Anybody can sign for keys of small order, so they must not become keys.
func TestWeakKeys(t *testing.T) {
	p := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 255), big.NewInt(19))
	encode := func(y *big.Int, sign byte) (b [32]byte) {
		y.FillBytes(b[:])
		slices.Reverse(b[:])
		b[31] |= sign << 7
		return b
	}
	// The y of the points whose order divides 8, from the curve's equation: those of
	// order 8 double to (x, 0), so that d y^4 + 2 y^2 - 1 = 0.
	d := new(big.Int).ModInverse(big.NewInt(121666), p)
	d.Mul(d, big.NewInt(-121665)).Mod(d, p)
	root := new(big.Int).ModSqrt(new(big.Int).Mod(new(big.Int).Add(d, big.NewInt(1)), p), p)
	require.NotNil(t, root)
	ys := []*big.Int{big.NewInt(0), big.NewInt(1), new(big.Int).Sub(p, big.NewInt(1))}
	for _, r := range []*big.Int{root, new(big.Int).Neg(root)} {
		y2 := new(big.Int).Sub(r, big.NewInt(1))
		y2.Mul(y2, new(big.Int).ModInverse(d, p)).Mod(y2, p)
		if y := new(big.Int).ModSqrt(y2, p); y != nil {
			ys = append(ys, y, new(big.Int).Sub(p, y))
		}
	}
	require.Len(t, ys, 5)
	forged := 0
	for _, y := range ys {
		for sign := range byte(2) {
			pub := encode(y, sign)
			_, err := NewKey("k", pub[:])
			require.ErrorIs(t, err, ErrKey, "%x", pub)
			// R is the neutral element and S is 0: verifies whenever the hash is a
			// multiple of the order, for one message in eight or more.
			for i := range 200 {
				msg, sig := []byte{byte(i)}, make([]byte, 64)
				sig[0] = 1
				if ed25519.Verify(pub[:], msg, sig) {
					forged++
					break
				}
			}
		}
	}
	require.GreaterOrEqual(t, forged, 8, "these keys are as weak as they are said to be")

	for i := range int64(19) { // encodings of 0 to 18 that are not canonical
		pub := encode(new(big.Int).Add(p, big.NewInt(i)), byte(i%2))
		_, err := NewKey("k", pub[:])
		require.ErrorIs(t, err, ErrKey, "%x", pub)
	}
	pub := encode(new(big.Int).Sub(p, big.NewInt(2)), 0)
	_, err := NewKey("k", pub[:])
	require.NoError(t, err, "p-2 is canonical")
}

func TestKeys(t *testing.T) {
	private, k, err := GenerateKey(rand.Reader, "release-2026")
	require.NoError(t, err)
	s, err := ParseSigner(private)
	require.NoError(t, err)
	same, err := ParseKey(k.String())
	require.NoError(t, err)
	require.Equal(t, k, same)
	require.True(t, strings.HasPrefix(k.String(), k.ID()+"+"))
	require.False(t, k.Published())
	require.False(t, Key{}.Verify(nil, make([]byte, 64)))

	// The same as of golang.org/x/mod.
	theirs, err := note.NewSigner(private)
	require.NoError(t, err)
	require.Equal(t, theirs.KeyHash(), s.KeyHash())
	v, err := note.NewVerifier(k.String())
	require.NoError(t, err)
	require.Equal(t, v.KeyHash(), k.KeyHash())
	require.Equal(t, v.Name(), k.Name())

	text := k.String()
	for i := range text {
		for _, c := range []byte{text[i] ^ 1, text[i] ^ 0x20, '+', 'A', '=', '\n'} {
			if c == text[i] {
				continue
			}
			_, err := ParseKey(text[:i] + string(c) + text[i+1:])
			require.ErrorIs(t, err, ErrKey, "byte %d", i)
		}
		_, err := ParseKey(text[:i])
		require.ErrorIs(t, err, ErrKey)
	}
	for i := range private {
		if _, err := ParseSigner(private[:i] + "!" + private[i+1:]); err != nil {
			require.ErrorIs(t, err, ErrKey)
			require.NotContains(t, err.Error(), private[len(private)-40:])
		} else {
			require.Fail(t, "accepted", "byte %d", i)
		}
	}
	for _, name := range []string{"", "a b", "a+b", "a\nb", `a"b`, `a\b`, "a<b", "ü", "a\u00a0b", strings.Repeat("x", MaxName+1)} {
		_, _, err := GenerateKey(rand.Reader, name)
		require.ErrorIs(t, err, ErrKey, "%q", name)
	}
	_, err = NewKey("x", make([]byte, 31))
	require.ErrorIs(t, err, ErrKey)
	_, err = NewSigner("x", rsaKey{})
	require.ErrorIs(t, err, ErrKey)
	_, _, err = GenerateKey(bytes.NewReader(nil), "x")
	require.Error(t, err)
}

// A key module that answers nonsense is noticed before anything is written.
func TestBrokenModule(t *testing.T) {
	s, err := NewSigner("hsm", brokenModule{newSigner(t, "x").Key().Public(), make([]byte, 64), nil})
	require.NoError(t, err)
	n := Note{Text: "x\n"}
	require.ErrorIs(t, n.Sign(s), ErrSignature)
	require.Empty(t, n.Signatures)
	away := errors.New("no module")
	s, err = NewSigner("hsm", brokenModule{newSigner(t, "x").Key().Public(), nil, away})
	require.NoError(t, err)
	require.ErrorIs(t, n.Sign(s), away)
	require.ErrorIs(t, n.Sign(nil), ErrKey)
}

// Keys that everybody has are known as such.
func TestPublished(t *testing.T) {
	for _, seed := range []string{"slotota test root", "slotota test release"} {
		sum := sha256.Sum256([]byte(seed))
		s, err := NewSigner("x", ed25519.NewKeyFromSeed(sum[:]))
		require.NoError(t, err)
		require.True(t, s.Key().Published())
	}
	for _, text := range []string{ // of golang.org/x/mod/sumdb/note, RFC 8032
		"PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
	} {
		k, err := ParseKey(text)
		require.NoError(t, err)
		require.True(t, k.Published())
	}
	zero, err := NewSigner("x", ed25519.NewKeyFromSeed(make([]byte, 32)))
	require.NoError(t, err)
	require.True(t, zero.Key().Published())
}

// Our notes are notes to golang.org/x/mod, and theirs to us.
func TestNoteInterop(t *testing.T) {
	a, b := newSigner(t, "a"), newSigner(t, "b")
	manifest := []byte(`{"name":"x"}`)
	ours := sign(t, ManifestText(manifest), a, b)
	theirs, err := note.Sign(&note.Note{Text: ManifestText(manifest)}, a, b)
	require.NoError(t, err)
	require.Equal(t, string(theirs), string(ours))

	va, err := note.NewVerifier(a.Key().String())
	require.NoError(t, err)
	open, err := note.Open(ours, note.VerifierList(va))
	require.NoError(t, err)
	require.Equal(t, ManifestText(manifest), open.Text)
	require.Len(t, open.Sigs, 1)
	require.Len(t, open.UnverifiedSigs, 1)

	n, err := ParseNote(theirs)
	require.NoError(t, err)
	by, err := n.SignedBy([]Key{b.Key(), a.Key()})
	require.NoError(t, err)
	require.Equal(t, []Key{a.Key(), b.Key()}, by)
	by, err = n.SignedBy(nil)
	require.NoError(t, err)
	require.Empty(t, by)

	more, err := note.Sign(&note.Note{Text: open.Text, Sigs: open.Sigs, UnverifiedSigs: open.UnverifiedSigs}, newSigner(t, "c"))
	require.NoError(t, err)
	n, err = ParseNote(more)
	require.NoError(t, err)
	require.Len(t, n.Signatures, 3)
}

func TestManifestText(t *testing.T) {
	require.Equal(t, "slotota bundle v1\nsize 3\nsha256 ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=\n", ManifestText([]byte("abc")))
	require.True(t, IsManifestNote([]byte(ManifestText(nil))))
	require.True(t, IsManifestNote([]byte("slotota bundle v2\nx")), "of a later version, and thus no attribute")
	require.False(t, IsManifestNote([]byte("hello")))
}

// One form only: whatever is changed in a note, it is no note, or another one, or
// not signed.
func TestNoteEveryByte(t *testing.T) {
	m := newTeam(t)
	a := m.open(t)
	manifest := []byte("manifest")
	b := sign(t, ManifestText(manifest), m.release[0])
	_, err := a.VerifyManifest(manifest, b)
	require.NoError(t, err)
	for i := range b {
		for _, x := range []byte{1, 2, 4, 8, 0x10, 0x20, 0x40, 0x80, 0xff} {
			c := slices.Clone(b)
			c[i] ^= x
			_, err := a.VerifyManifest(manifest, c)
			requireTyped(t, err, "byte %d ^ %#x", i, x)
		}
		_, err := a.VerifyManifest(manifest, b[:i])
		requireTyped(t, err, "cut at %d", i)
		_, err = a.VerifyManifest(manifest, slices.Insert(slices.Clone(b), i, b[i]))
		requireTyped(t, err, "doubled at %d", i)
	}
	_, err = a.VerifyManifest(manifest, append(b, '\n'))
	require.ErrorIs(t, err, ErrFormat)
	_, err = a.VerifyManifest([]byte("manifesu"), b)
	require.ErrorIs(t, err, ErrText)
	_, err = a.VerifyManifest([]byte("manifes"), b)
	require.ErrorIs(t, err, ErrText)
}

// requireTyped wants an error that says why.
func requireTyped(t *testing.T, err error, format string, args ...any) {
	t.Helper()
	for _, is := range []error{ErrFormat, ErrTooLarge, ErrKey, ErrRecord, ErrSignature, ErrText, ErrUnsigned, ErrVersion, ErrOld, ErrFork, ErrExpired} {
		if errors.Is(err, is) {
			return
		}
	}
	require.Fail(t, "no typed error", append([]any{"%v: " + format, err}, args...)...)
}

func TestNoteRefusals(t *testing.T) {
	s := newSigner(t, "a")
	good := string(sign(t, "x\n", s))
	line := strings.SplitAfter(good, "\n")[2]
	for name, text := range map[string]string{
		"empty": "", "no signature block": "x\n", "line twice": good + line, "carriage return": strings.ReplaceAll(good, "\n", "\r\n"),
		"hyphen": strings.Replace(good, "—", "-", 1), "two blanks": strings.Replace(good, "a ", "a  ", 1),
		"base64 with a line end": strings.Replace(good, "=", "\n=", 1), "padding bits": good[:len(good)-3] + "B=\n", "nothing": "x\n\n— a \n", "short": "x\n\n— a AAAAAA==\n",
		"invalid UTF-8": "\xff\n\n" + line, "DEL": "\x7f\n\n" + line, "a blank line more": strings.Replace(good, "\n\n", "\n\n\n", 1), "no last line end": good[:len(good)-1],
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseNote([]byte(text))
			require.ErrorIs(t, err, ErrFormat)
		})
	}
	_, err := ParseNote(append([]byte(good), make([]byte, MaxNote)...))
	require.ErrorIs(t, err, ErrTooLarge)
	n := Note{Text: "x\n"}
	for i := range MaxSignatures + 1 {
		n.Add(Signature{"a", uint32(i), []byte{1}})
	}
	_, err = ParseNote(n.Bytes())
	require.ErrorIs(t, err, ErrTooLarge)
	n.Signatures = n.Signatures[1:]
	same, err := ParseNote(n.Bytes())
	require.NoError(t, err)
	require.Equal(t, n, *same)
}

func TestNoteEdit(t *testing.T) {
	a, b := newSigner(t, "a"), newSigner(t, "b")
	n := Note{Text: "x\n"}
	require.NoError(t, n.Sign(a, b, a))
	require.Len(t, n.Signatures, 2)
	wrong := n.Signatures[0]
	wrong.Sig = make([]byte, 64)
	n.Add(wrong)
	_, err := n.SignedBy([]Key{a.Key(), b.Key()})
	require.ErrorIs(t, err, ErrSignature, "one wrong signature by a key that counts is enough to refuse the note")
	by, err := n.SignedBy([]Key{b.Key()})
	require.NoError(t, err, "but those of others are of no account")
	require.Equal(t, []Key{b.Key()}, by)
	require.False(t, n.Remove("c"))
	require.True(t, n.Remove(a.Key().ID()))
	require.True(t, n.Remove("b"))
	require.Empty(t, n.Signatures)
}

func TestThreshold(t *testing.T) {
	m := newTeam(t)
	m.rec.Release = role(2, newSigner(t, "c"), m.release[0], m.release[1])
	a := m.open(t)
	manifest := []byte("m")
	text := ManifestText(manifest)
	by, err := a.VerifyManifest(manifest, sign(t, text, m.release...))
	require.NoError(t, err)
	require.Equal(t, []Key{m.release[0].Key(), m.release[1].Key()}, by)
	_, err = a.VerifyManifest(manifest, sign(t, text, m.release[0]))
	require.ErrorIs(t, err, ErrUnsigned)
	require.ErrorIs(t, err, ota.ErrUnverified)
	require.NotErrorIs(t, err, ErrUnknownKey)
	_, err = a.VerifyManifest(manifest, sign(t, text, m.release[0], m.root[0], m.root[1]))
	require.ErrorIs(t, err, ErrUnsigned, "root keys are not release keys")
	_, err = a.VerifyManifest(manifest, sign(t, text, m.root...))
	require.ErrorIs(t, err, ErrUnknownKey)
	_, err = a.VerifyManifest(manifest, sign(t, text))
	require.ErrorIs(t, err, ErrUnsigned)
	require.NotErrorIs(t, err, ErrUnknownKey)
	n, err := ParseNote(sign(t, text, m.release...))
	require.NoError(t, err)
	n.Signatures[1].Sig = bytes.Clone(n.Signatures[0].Sig)
	_, err = a.VerifyManifest(manifest, n.Bytes())
	require.ErrorIs(t, err, ErrSignature, "the signature of another key")
}

// One key counts once, by however many names it goes.
func TestOneKeyTwoNames(t *testing.T) {
	one := newSigner(t, "one")
	again, err := NewSigner("two", one.sign)
	require.NoError(t, err)
	require.NotEqual(t, one.Key().ID(), again.Key().ID())
	r := role(2, one, again)
	require.ErrorContains(t, r.check(), "the same key")
	m := newTeam(t)
	m.rec.Release = r
	_, err = m.rec.Text()
	require.ErrorIs(t, err, ErrRecord)
	_, err = ParseRecord(m.rec.text())
	require.ErrorIs(t, err, ErrRecord)

	// And if such a record were accepted:
	n, err := ParseNote(sign(t, "x\n", one, again))
	require.NoError(t, err)
	_, err = n.verify(&r, "release")
	require.ErrorIs(t, err, ErrUnsigned)
	r.Threshold = 1
	by, err := n.verify(&r, "release")
	require.NoError(t, err)
	require.Len(t, by, 2)
}

func TestRecordGolden(t *testing.T) {
	golden := readGolden(t, "trust")
	n, err := ParseNote(golden)
	require.NoError(t, err)
	r, err := ParseRecord(n.Text)
	require.NoError(t, err)
	require.Equal(t, uint64(1), r.Version)
	require.Equal(t, uint64(100), r.SecurityStep)
	require.Equal(t, uint64(5), r.SecurityMin)
	require.Equal(t, "2030-01-01T00:00:00Z", r.Expires.Format(time.RFC3339))
	require.Equal(t, "root-test", r.Root.Keys[0].Name())
	a, err := Open(golden)
	require.NoError(t, err)
	require.Equal(t, string(golden), string(a.Bytes()))
	by, err := a.VerifyManifest(readGolden(t, "manifest.json"), readGolden(t, "note"))
	require.NoError(t, err)
	require.Equal(t, "release-test", by[0].Name())

	// Signatures are deterministic, so this is what other implementations make too.
	sum := sha256.Sum256([]byte("slotota test root"))
	s, err := NewSigner("root-test", ed25519.NewKeyFromSeed(sum[:]))
	require.NoError(t, err)
	require.Equal(t, string(golden), string(sign(t, n.Text, s)))
}

func readGolden(t *testing.T, name string) []byte {
	b, err := os.ReadFile("testdata/golden/" + name)
	require.NoError(t, err)
	return b
}

func TestRecordRefusals(t *testing.T) {
	m := newTeam(t)
	for name, change := range map[string]func(*Record){
		"version 0":              func(r *Record) { r.Version = 0 },
		"version too great":      func(r *Record) { r.Version = 1 << 53 },
		"step 0":                 func(r *Record) { r.SecurityStep = 0 },
		"step too great":         func(r *Record) { r.SecurityStep = 1 << 53 },
		"min too great":          func(r *Record) { r.SecurityMin = 1 << 53 },
		"expires in ns":          func(r *Record) { r.Expires = time.Unix(1e9, 1) },
		"expires in 10000":       func(r *Record) { r.Expires = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) },
		"expires in 1969":        func(r *Record) { r.Expires = time.Date(1969, 1, 1, 0, 0, 0, 0, time.UTC) },
		"root threshold 0":       func(r *Record) { r.Root.Threshold = 0 },
		"root threshold -1":      func(r *Record) { r.Root.Threshold = -1 },
		"root threshold 4 of 3":  func(r *Record) { r.Root.Threshold = 4 },
		"release threshold 0":    func(r *Record) { r.Release.Threshold = 0 },
		"release threshold of 3": func(r *Record) { r.Release.Threshold = 3 },
		"no root":                func(r *Record) { r.Root = Role{} },
		"no release":             func(r *Record) { r.Release.Keys = nil },
		"zero key":               func(r *Record) { r.Release.Keys = append(r.Release.Keys, Key{}) },
		"key twice":              func(r *Record) { r.Root.Keys = append(r.Root.Keys, r.Root.Keys[0]) },
		"key in both roles":      func(r *Record) { r.Release.Keys = append(r.Release.Keys, r.Root.Keys[2]) },
		"too many keys": func(r *Record) {
			for range MaxKeys {
				r.Root.Keys = append(r.Root.Keys, newSigner(t, "x").Key())
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := (&Anchor{[]link{{rec: &m.rec}}}).Record() // a deep copy
			change(&r)
			_, err := r.Text()
			require.ErrorIs(t, err, ErrRecord)
			if name != "expires in ns" { // which a text cannot say
				_, err = ParseRecord(r.text())
				requireTyped(t, err, "read")
			}
		})
	}
	text, err := m.rec.Text()
	require.NoError(t, err)
	for name, change := range map[string][2]string{
		"leading zero": {"step 100", "step 0100"}, "plus": {"step 100", "step +100"}, "min of 0": {"step 100\n", "step 100\nmin 0\n"},
		"no step": {"step 100\n", ""}, "step twice": {"step 100\n", "step 100\nstep 100\n"}, "order": {"version 1\nstep 100", "step 100\nversion 1"},
		"other version": {"trust v1", "trust v2"}, "case": {"version", "Version"}, "blank": {"version 1", "version  1"}, "unknown line": {"root 2\n", "x 1\nroot 2\n"},
		"time zone": {"root 2\n", "expires 2030-01-01T00:00:00+00:00\nroot 2\n"}, "fraction": {"root 2\n", "expires 2030-01-01T00:00:00.0Z\nroot 2\n"},
		"not a time": {"root 2\n", "expires never\nroot 2\n"}, "2^64": {"version 1", "version 18446744073709551616"}, "2^53": {"version 1", "version 9007199254740992"},
		"negative": {"version 1", "version -1"}, "threshold": {"root 2", "root 99999999999"}, "key elsewhere": {"root 2\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			require.Contains(t, text, change[0])
			_, err := ParseRecord(strings.Replace(text, change[0], change[1], 1))
			requireTyped(t, err, "%s", name)
		})
	}
	r, err := ParseRecord(text)
	require.NoError(t, err)
	require.Equal(t, m.rec, *r)
	m.rec.Expires = time.Date(2030, 1, 1, 2, 0, 0, 0, time.FixedZone("", 7200))
	text, err = m.rec.Text()
	require.NoError(t, err)
	require.Contains(t, text, "\nexpires 2030-01-01T00:00:00Z\n")
	_, err = ParseRecord(text + strings.Repeat("x", MaxNote))
	require.ErrorIs(t, err, ErrTooLarge)
}

// Every byte of a record counts.
func TestRecordEveryByte(t *testing.T) {
	m := newTeam(t)
	b := signRecord(t, m.rec, m.root[:2]...)
	_, err := Open(b)
	require.NoError(t, err)
	for i := range b {
		for _, x := range []byte{1, 0x20, 0x80} {
			c := slices.Clone(b)
			c[i] ^= x
			_, err := Open(c)
			requireTyped(t, err, "byte %d ^ %#x", i, x)
		}
		_, err := Open(b[:i])
		requireTyped(t, err, "cut at %d", i)
	}
}

func TestRotation(t *testing.T) {
	m := newTeam(t)
	a := m.open(t)
	alice, bob, carol := m.root[0], m.root[1], m.root[2]
	dave, erin := newSigner(t, "dave"), newSigner(t, "erin")
	other := m.next()
	other.Root = role(2, alice, dave, erin)
	both := signRecord(t, other, alice, bob, dave)

	b, err := a.Update(both)
	require.NoError(t, err)
	require.Equal(t, uint64(2), b.Record().Version)
	require.Equal(t, uint64(1), a.Record().Version, "the old one stays as it is")
	require.Equal(t, other, b.Record())

	for name, c := range map[string]struct {
		chain []byte
		want  error
	}{
		"by nobody":                            {signRecord(t, other), ErrUnsigned},
		"by the old keys only":                 {signRecord(t, other, alice, bob, carol), ErrUnsigned},
		"by the new keys only":                 {signRecord(t, other, alice, dave, erin), ErrUnsigned},
		"by strangers":                         {signRecord(t, other, newSigner(t, "x"), newSigner(t, "y")), ErrUnsigned},
		"by release keys":                      {signRecord(t, other, m.release...), ErrUnsigned},
		"by release keys and too few":          {signRecord(t, other, append(m.release, alice, dave)...), ErrUnsigned},
		"the same again":                       {a.Bytes(), ErrOld},
		"nothing":                              {nil, ErrFormat},
		"a note about a manifest":              {sign(t, ManifestText([]byte("m")), alice, bob), ErrFormat},
		"one byte in the chain's last":         {append(bytes.Clone(both), 'x'), ErrFormat},
		"too long":                             {make([]byte, MaxChain+1), ErrTooLarge},
		"another record of the same version":   {signRecord(t, func() Record { r := m.rec; r.SecurityStep++; return r }(), alice, bob), ErrFork},
		"skipped version":                      {signRecord(t, func() Record { r := other; r.Version = 3; return r }(), alice, bob, dave), ErrVersion},
		"lowered threshold, signed by as many": {signRecord(t, func() Record { r := m.next(); r.Root.Threshold = 1; return r }(), alice), ErrUnsigned},
		"release keys made root": {signRecord(t, func() Record {
			r := m.next()
			r.Root, r.Release = r.Release, r.Root
			return r
		}(), m.release...), ErrUnsigned},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := a.Update(c.chain)
			require.ErrorIs(t, err, c.want)
		})
	}
	_, err = b.Update(signRecord(t, m.rec, alice, bob))
	require.ErrorIs(t, err, ErrOld, "replay of an old record")
	_, err = b.Update(a.Bytes())
	require.ErrorIs(t, err, ErrOld)

	// Thresholds may go down, if enough of the old keys want that.
	low := m.next()
	low.Root.Threshold = 1
	_, err = a.Update(signRecord(t, low, alice, bob))
	require.NoError(t, err)

	third := other
	third.Version = 3
	third.Root = role(1, erin)
	r3 := signRecord(t, third, dave, erin)
	chain := slices.Concat(a.Bytes(), both, r3)
	for name, c := range map[string][]byte{"whole": chain, "rest": slices.Concat(both, r3)} {
		d, err := a.Update(c)
		require.NoError(t, err, name)
		require.Equal(t, uint64(3), d.Record().Version)
		require.Equal(t, string(chain), string(d.Bytes()), name)
	}
	d, err := Open(chain)
	require.NoError(t, err)
	require.Equal(t, uint64(3), d.Record().Version)
	e, err := b.Update(chain)
	require.NoError(t, err)
	require.Equal(t, string(chain), string(e.Bytes()))
	_, err = a.Update(r3)
	require.ErrorIs(t, err, ErrVersion, "a link is missing")
	_, err = a.Update(slices.Concat(r3, both))
	require.ErrorIs(t, err, ErrVersion)
	_, err = Open(slices.Concat(a.Bytes(), r3))
	require.ErrorIs(t, err, ErrVersion)
	_, err = Open(slices.Concat(a.Bytes(), signRecord(t, other, alice, dave), r3))
	require.ErrorIs(t, err, ErrUnsigned, "a link is not signed by enough of the keys before it")

	// What precedes the common record cannot be planted.
	stranger := newTeam(t)
	fake := signRecord(t, stranger.rec, stranger.root[:2]...)
	d, err = b.Update(slices.Concat(fake, both, r3))
	require.NoError(t, err)
	require.Equal(t, string(chain), string(d.Bytes()))
}

// A record is the caller's copy.
func TestRecordIsACopy(t *testing.T) {
	m := newTeam(t)
	a := m.open(t)
	r := a.Record()
	r.Release.Keys[0] = newSigner(t, "mallory").Key()
	r.Release.Threshold = 0
	require.Equal(t, m.rec, a.Record())
}

func TestZeroAnchor(t *testing.T) {
	m := newTeam(t)
	var a Anchor
	require.Zero(t, a.Record().Version)
	require.Empty(t, a.Bytes())
	require.NoError(t, a.Expired(time.Now()))
	_, err := a.VerifyManifest([]byte("m"), sign(t, ManifestText([]byte("m")), m.release...))
	require.ErrorIs(t, err, ErrUnsigned)
	_, err = a.Update(signRecord(t, m.rec, m.root...))
	require.ErrorIs(t, err, ErrUnsigned)
}

func TestExpired(t *testing.T) {
	m := newTeam(t)
	require.NoError(t, m.open(t).Expired(time.Now().AddDate(1000, 0, 0)), "never")
	m.rec.Expires = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	a := m.open(t)
	require.NoError(t, a.Expired(m.rec.Expires.Add(-1)))
	require.ErrorIs(t, a.Expired(m.rec.Expires), ErrExpired)

	// Whoever was away for long can still learn about new keys.
	next := m.next()
	next.Expires = next.Expires.AddDate(5, 0, 0)
	b, err := a.Update(signRecord(t, next, m.root...))
	require.NoError(t, err)
	require.NoError(t, b.Expired(m.rec.Expires))
}
