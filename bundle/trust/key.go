package trust

import (
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/slotota/ota"
)

// MaxName is the greatest length of a key's name in bytes.
const MaxName = 64

// algEd25519 precedes keys in their text form (C2SP signed-note, signature types).
const algEd25519 = 1

var b64 = base64.StdEncoding.Strict()

// Key is an Ed25519 public key with a name. It is a note.Verifier of
// golang.org/x/mod/sumdb/note. The zero value verifies nothing.
type Key struct {
	name string
	hash uint32
	pub  [ed25519.PublicKeySize]byte
}

// NewKey returns the key of that name: 1 to 64 bytes of printable ASCII without
// blank, plus, quotation mark, backslash, ampersand and angle brackets. It refuses
// encodings of the key that are not canonical, and the points of small order, with
// which anybody can sign. Errors wrap [ErrKey].
func NewKey(name string, pub ed25519.PublicKey) (Key, error) {
	if err := checkName(name); err != nil {
		return Key{}, because(ErrKey, "%w", err)
	}
	if len(pub) != ed25519.PublicKeySize {
		return Key{}, because(ErrKey, "%d bytes instead of %d", len(pub), ed25519.PublicKeySize)
	}
	k := Key{name: name, pub: [ed25519.PublicKeySize]byte(pub)}
	if weak(k.pub) {
		return Key{}, because(ErrKey, "anybody can make signatures for it")
	}
	// C2SP signed-note, "Key IDs".
	sum := sha256.Sum256(slices.Concat([]byte(name), []byte{'\n', algEd25519}, pub))
	k.hash = binary.BigEndian.Uint32(sum[:])
	return k, nil
}

func checkName(name string) error {
	if name == "" || len(name) > MaxName {
		return fmt.Errorf("a name of %d bytes, need 1 to %d", len(name), MaxName)
	}
	for _, c := range []byte(name) {
		if c <= ' ' || c > '~' || strings.IndexByte(`+"\&<>`, c) >= 0 {
			return fmt.Errorf("the name %s has a character other than printable ASCII without + \" \\ & < >", ota.Quote(name))
		}
	}
	return nil
}

// weak says whether pub is no canonical encoding (RFC 8032, section 5.1.3), or
// that of a point of order 1, 2, 4 or 8.
func weak(pub [32]byte) bool {
	y := pub
	y[31] &= 0x7f // the sign of x
	prime := [32]byte{0: 0xed, 31: 0x7f}
	for i := 1; i < 31; i++ {
		prime[i] = 0xff
	}
	for i := 31; i >= 0 && y[i] >= prime[i]; i-- {
		if y[i] > prime[i] || i == 0 {
			return true // y is at least the prime of the field
		}
	}
	return slices.Contains(smallOrder, hex.EncodeToString(y[:]))
}

// smallOrder are the y coordinates of the points whose order divides 8.
var smallOrder = []string{
	"0000000000000000000000000000000000000000000000000000000000000000",
	"0100000000000000000000000000000000000000000000000000000000000000",
	"26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
	"c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
	"ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
}

// ParseKey reads a public key in the text form that [Key.String] returns,
// NAME+HASH+BASE64, a "verifier key" of signed-note. Errors wrap [ErrKey].
func ParseKey(s string) (Key, error) {
	k, err := parseKey(s)
	if err == nil && k.String() != s {
		err = because(ErrKey, "%s is not the key of %s", ota.Quote(s), ota.Quote(k.ID()))
	}
	if err != nil {
		return Key{}, err
	}
	return k, nil
}

func parseKey(s string) (Key, error) {
	name, rest, _ := strings.Cut(s, "+")
	_, text, ok := strings.Cut(rest, "+")
	if !ok {
		return Key{}, because(ErrKey, "%s: need NAME+HASH+BASE64", ota.Quote(s))
	}
	raw, err := b64.DecodeString(text)
	if err != nil || len(raw) == 0 || raw[0] != algEd25519 {
		return Key{}, because(ErrKey, "%s: not an Ed25519 key", ota.Quote(s))
	}
	return NewKey(name, raw[1:])
}

// String returns the text form of k, on one line.
func (k Key) String() string {
	return k.ID() + "+" + b64.EncodeToString(append([]byte{algEd25519}, k.pub[:]...))
}

// ID returns what signatures name a key by: the name, a plus sign, and the key
// hash in 8 hexadecimal digits.
func (k Key) ID() string { return id(k.name, k.hash) }

func id(name string, hash uint32) string { return fmt.Sprintf("%s+%08x", name, hash) }

// Public returns a copy of the key itself.
func (k Key) Public() ed25519.PublicKey { return slices.Clone(k.pub[:]) }

// Name implements note.Verifier.
func (k Key) Name() string { return k.name }

// KeyHash implements note.Verifier.
func (k Key) KeyHash() uint32 { return k.hash }

// Verify implements note.Verifier.
func (k Key) Verify(msg, sig []byte) bool {
	return k.name != "" && ed25519.Verify(k.pub[:], msg, sig)
}

// Published says whether the private half of k is known to everybody: those in
// the documentation of this project, of golang.org/x/mod/sumdb/note and in RFC
// 8032, section 7.1.
func (k Key) Published() bool { return slices.Contains(published, hex.EncodeToString(k.pub[:])) }

var published = []string{
	"21e58101a4ec3914431e9d7e1e43fe2af93f73721a271fff199bfc17f2209c1e", // root-test of docs/SIGNING.md
	"71b7328b2026e47594caa0cf0060ed45cc3e966201533f54d6349d20209ad70f", // release-test
	"3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29", // of a seed of zeros
	"1a5cd907143c384c41e830c5bce12aa8817ec5649aaabf2c31388b35b2d744d6", // PeterNeumann
	"d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", // RFC 8032
	"3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
	"278117fc144c72340f67d0f2316e8386ceffbf2b2428c9c51fef7c597f1d426e",
	"fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
	"ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
}

// Signer makes signatures that a [Key] verifies. It is a note.Signer of
// golang.org/x/mod/sumdb/note.
type Signer struct {
	key  Key
	sign crypto.Signer
}

// NewSigner returns the signer for a key of that name that is kept elsewhere, such
// as in a hardware module: s signs messages with Ed25519, without hashing them first.
func NewSigner(name string, s crypto.Signer) (*Signer, error) {
	pub, ok := s.Public().(ed25519.PublicKey)
	if !ok {
		return nil, because(ErrKey, "not an Ed25519 key")
	}
	k, err := NewKey(name, pub)
	if err != nil {
		return nil, err
	}
	return &Signer{k, s}, nil
}

// GenerateKey makes a key pair with random bytes from rand (crypto/rand.Reader).
// private is secret; it has the form that [ParseSigner] reads, a "signer key" of
// golang.org/x/mod/sumdb/note.
func GenerateKey(rand io.Reader, name string) (private string, public Key, err error) {
	seed := make([]byte, ed25519.SeedSize)
	if _, err := io.ReadFull(rand, seed); err != nil {
		return "", Key{}, err
	}
	s, err := NewSigner(name, ed25519.NewKeyFromSeed(seed))
	if err != nil {
		return "", Key{}, err
	}
	return "PRIVATE+KEY+" + s.key.ID() + "+" + b64.EncodeToString(append([]byte{algEd25519}, seed...)), s.key, nil
}

// ParseSigner reads a private key, PRIVATE+KEY+NAME+HASH+BASE64. Errors wrap
// [ErrKey] and do not repeat the key.
func ParseSigner(private string) (*Signer, error) {
	f := strings.SplitN(private, "+", 5)
	if len(f) != 5 || f[0] != "PRIVATE" || f[1] != "KEY" {
		return nil, because(ErrKey, "need PRIVATE+KEY+NAME+HASH+BASE64")
	}
	raw, err := b64.DecodeString(f[4])
	if err != nil || len(raw) != 1+ed25519.SeedSize || raw[0] != algEd25519 {
		return nil, because(ErrKey, "not an Ed25519 private key")
	}
	s, err := NewSigner(f[2], ed25519.NewKeyFromSeed(raw[1:]))
	if err != nil {
		return nil, err
	}
	if hash, err := strconv.ParseUint(f[3], 16, 32); err != nil || uint32(hash) != s.key.hash || len(f[3]) != 8 {
		return nil, because(ErrKey, "the key hash is wrong")
	}
	return s, nil
}

// Key returns the public key.
func (s *Signer) Key() Key { return s.key }

// Name implements note.Signer.
func (s *Signer) Name() string { return s.key.name }

// KeyHash implements note.Signer.
func (s *Signer) KeyHash() uint32 { return s.key.hash }

// Sign implements note.Signer. What the key does not verify is an error: a module
// may be broken, or hold another key by now.
func (s *Signer) Sign(msg []byte) ([]byte, error) {
	sig, err := s.sign.Sign(nil, msg, crypto.Hash(0))
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", s.key.ID(), err)
	}
	if !s.key.Verify(msg, sig) {
		return nil, because(ErrSignature, "key %s has made one that it does not verify", s.key.ID())
	}
	return sig, nil
}
