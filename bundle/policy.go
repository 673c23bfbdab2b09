package bundle

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/bundle/trust"
	"github.com/slotota/ota/internal/strictjson"
)

// MaxKeys bounds the indices of signatures, and thus the keys of a [Policy]. Only
// four signatures at a time fit into what devices read of a bundle's directory,
// 512 bytes per entry, and [Write] makes no bundle with more.
const MaxKeys = 8

// Policy says which bundles are accepted. The zero value and nil accept none. It must
// not be changed while it is in use, and may then be used concurrently.
type Policy struct {
	// Keys are the P-256 public keys that bundles are signed with. A key
	// verifies the signature that has its index only, as update.key0 to
	// update.key7 of Mongoose OS do; nil leaves an index out.
	Keys []*ecdsa.PublicKey
	// Required is a bit mask of indices whose signatures must all be valid
	// (update.sig_req_mask of Mongoose OS).
	Required uint8
	// Threshold is how many different keys must have valid signatures. If it
	// and Required are 0, all Keys must have.
	Threshold int

	// Trust names the release keys of which enough must have signed the note. It
	// also sets the lowest security version, and SecurityStep of what Info of the
	// [Reader] returns. nil leaves all of that out.
	Trust *trust.Anchor
	// Clock returns the time, and whether it can be trusted. With it, nothing is
	// accepted on account of Trust once that has expired; while it is nil or
	// returns false, expiry is not looked at.
	Clock func() (now time.Time, ok bool)

	// AllowUnsigned accepts bundles that have none of the signatures above,
	// or too few of them. One that is present and wrong is refused even then.
	AllowUnsigned bool
	// AllowSHA1 accepts, in unsigned bundles only, parts whose digest is a
	// SHA-1, as in bundles made before 2020. It needs AllowUnsigned.
	AllowSHA1 bool
	// AllowTestKeys accepts keys whose private halves are public knowledge.
	AllowTestKeys bool

	// MaxManifest bounds the manifest, in bytes; 0 means 64 KiB, which is also
	// the most.
	MaxManifest int
	// MaxSize bounds the content of all parts together, in bytes; 0 means no
	// bound but that of the format: for a part nearly 4 GiB, and 1 TiB if it is
	// stored as zstd.
	MaxSize int64
	// MaxIndex bounds the digests of frames and chunks, in bytes, and thus the
	// memory that they take; 0 means 4 MiB, enough for 3.7 GiB in frames and
	// chunks of 64 KiB. 64 MiB is the most.
	MaxIndex int64
	// MaxWindow bounds the frames and windows of parts that are stored as zstd,
	// in bytes; 0 means 8 MiB, and 64 MiB is the most. To decode takes twice
	// the frame (as it is stored, and decoded), for each frame that is decoded
	// at the same time, and not more than 8 MiB as long as that is enough for
	// two; and half a megabyte for each of Workers.
	MaxWindow int64
	// Workers is how many frames are decoded at the same time; 0 means
	// GOMAXPROCS, but at most 4. With 1 there are no goroutines.
	Workers int
}

const (
	maxManifest     = 64 << 10
	defaultIndex    = 4 << 20
	defaultMaxFrame = 8 << 20
)

func (p *Policy) maxIndex() int64  { return or(p.MaxIndex, defaultIndex) }
func (p *Policy) maxWindow() int64 { return or(p.MaxWindow, defaultMaxFrame) }

// or returns v, or else instead of 0.
func or(v, instead int64) int64 {
	if v == 0 {
		return instead
	}
	return v
}

// Open reads the beginning of the bundle r, to the end of its manifest, and
// checks all that can be known by then: the signatures, then the manifest and
// its digests. Nothing needs to be erased for a bundle that fails here.
//
// Errors are of type [*Error]. They wrap [ErrPolicy] if p itself is unusable,
// in which case nothing is read. r is read by the Reader from then on, and is
// never read concurrently. An r whose Read blocks delays the effect of ctx.
func (p *Policy) Open(ctx context.Context, r io.Reader) (*Reader, error) {
	if p == nil {
		p = &Policy{}
	}
	if err := p.check(); err != nil {
		return nil, &Error{Off: -1, Err: err}
	}
	b, err := open(ctx, r, p)
	if err != nil {
		return nil, err
	}
	return b, nil
}

// OpenRanges is Open for a bundle of which not all may have to be read: of a
// part that has chunks only what [ota.Selector] was told to yield is, as far as
// its encoding permits. It makes one call of src.Ranges for the first 64 KiB,
// one for what that leaves of the index, as a rule one for each part (its data
// and the next header), and one for the end of the archive. Readers are closed
// by [Reader.Close], if Next did not return an error or io.EOF.
func (p *Policy) OpenRanges(ctx context.Context, src Source) (*Reader, error) {
	if p == nil {
		p = &Policy{}
	}
	if err := p.check(); err != nil {
		return nil, &Error{Off: -1, Err: err}
	}
	b, err := openRanges(ctx, src, p)
	if err != nil {
		return nil, err
	}
	return b, nil
}

// Image is Open for callers that need no more than an [ota.Image].
func (p *Policy) Image(ctx context.Context, r io.Reader) (ota.Image, error) {
	b, err := p.Open(ctx, r)
	if err != nil {
		return nil, err // not a nil *Reader inside of an interface
	}
	return b, nil
}

// Verify reads the whole bundle r and checks all of it, including the SHA-256
// of every part. The Reader it returns has no parts left to read, and serves
// to say what was found.
func (p *Policy) Verify(ctx context.Context, r io.Reader) (*Reader, error) {
	b, err := p.Open(ctx, r)
	if err != nil {
		return nil, err
	}
	for {
		switch _, err := b.Next(ctx); err {
		case nil:
		case io.EOF:
			return b, nil
		default:
			return nil, err
		}
	}
}

// check refuses policies that contradict themselves.
func (p *Policy) check() error {
	if len(p.Keys) > MaxKeys {
		return because(ErrPolicy, "more than %d keys", MaxKeys)
	}
	all, distinct := uint8(0), map[string]bool{}
	for i, k := range p.Keys {
		if k == nil {
			continue
		}
		der, err := marshalKey(k)
		if err != nil {
			return because(ErrPolicy, "key %d: %w", i, err)
		}
		if !p.AllowTestKeys && slices.Contains(testKeys, keyID(der)) {
			return because(ErrPolicy, "key %d: its private half is published; it is for tests only", i)
		}
		all |= 1 << i
		distinct[string(der)] = true
	}
	need := p.need(all)
	mine := map[string]bool{}
	for i, k := range p.Keys {
		if need&(1<<i) != 0 && k != nil {
			der, _ := marshalKey(k)
			mine[string(der)] = true
		}
	}
	switch {
	case all == 0 && p.Trust == nil && !p.AllowUnsigned:
		return because(ErrPolicy, "no keys, and unsigned bundles are not allowed")
	case need&^all != 0:
		return because(ErrPolicy, "a signature is required that there is no key for")
	case len(mine) != bits.OnesCount8(need):
		return because(ErrPolicy, "the same key is required twice")
	case p.Threshold < 0 || p.Threshold > len(distinct):
		return because(ErrPolicy, "a threshold of %d with %d different keys", p.Threshold, len(distinct))
	case p.AllowSHA1 && !p.AllowUnsigned:
		return because(ErrPolicy, "SHA-1 is for unsigned bundles, which are not allowed")
	case p.MaxManifest < 0 || p.MaxManifest > maxManifest || p.MaxSize < 0 || p.MaxIndex < 0 || p.MaxIndex > maxIndex ||
		p.MaxWindow < 0 || p.MaxWindow > MaxFrame || p.Workers < 0:
		return because(ErrPolicy, "a limit is out of range")
	case p.Trust != nil && p.Trust.Record().Version == 0:
		return because(ErrPolicy, "a trust anchor that trusts nobody")
	case p.Trust != nil && !p.AllowTestKeys:
		r := p.Trust.Record()
		for _, k := range slices.Concat(r.Root.Keys, r.Release.Keys) {
			if k.Published() {
				return because(ErrPolicy, "trusted key %s: its private half is published; it is for tests only", k.ID())
			}
		}
	}
	return nil
}

// need returns the mask of required signatures, given that of all keys.
func (p *Policy) need(all uint8) uint8 {
	if p.Required == 0 && p.Threshold == 0 {
		return all
	}
	return p.Required
}

// verify checks the signatures of a manifest. It returns the names of the
// signers, none if the bundle passes as unsigned.
func (p *Policy) verify(manifest []byte, have *signatures) (signers []string, err error) {
	type check func([]byte, *signatures) ([]string, error)
	var checks []check
	if slices.ContainsFunc(p.Keys, func(k *ecdsa.PublicKey) bool { return k != nil }) {
		checks = append(checks, p.verifySigs)
	}
	if p.Trust != nil {
		checks = append(checks, p.verifyNote)
	}
	var missing error
	if len(checks) == 0 {
		missing = because(ErrUnsigned, "nobody is trusted")
	}
	for _, c := range checks {
		by, err := c(manifest, have)
		if err != nil && !errors.Is(err, ErrUnsigned) {
			return nil, err
		}
		if missing == nil {
			missing = err
		}
		signers = append(signers, by...)
	}
	if missing == nil && len(signers) > 0 {
		return signers, nil
	}
	if p.AllowUnsigned {
		return nil, nil
	}
	return nil, missing
}

// verifyNote checks the note. Errors wrap ErrUnsigned if there is none, or if it
// proves too little; ErrSignature if there is something wrong with it.
func (p *Policy) verifyNote(manifest []byte, have *signatures) (signers []string, err error) {
	if have.note == nil {
		return nil, because(ErrUnsigned, "no note")
	}
	keys, err := p.Trust.VerifyManifest(manifest, have.note)
	if errors.Is(err, trust.ErrUnsigned) {
		return nil, because(ErrUnsigned, "%w", err)
	}
	if err != nil {
		return nil, because(ErrSignature, "%w", err)
	}
	if p.Clock != nil {
		if now, ok := p.Clock(); ok {
			if err := p.Trust.Expired(now); err != nil {
				return nil, because(ErrUnsigned, "%w", err)
			}
		}
	}
	for _, k := range keys {
		signers = append(signers, "note "+k.ID())
	}
	return signers, nil
}

// bound applies what the trust record says about security versions.
func (p *Policy) bound(info *ota.ImageInfo) error {
	if p.Trust == nil {
		return nil
	}
	r := p.Trust.Record()
	if info.Security < r.SecurityMin {
		return because(ota.ErrRollback, "security version %d, the trust record demands %d", info.Security, r.SecurityMin)
	}
	info.SecurityStep = r.SecurityStep
	return nil
}

// verifySigs checks sig0 to sig7, in the same way.
func (p *Policy) verifySigs(manifest []byte, have *signatures) (signers []string, err error) {
	sum := sha256.Sum256(manifest)
	var all, good uint8
	distinct := map[string]bool{}
	var bad error
	for i, k := range p.Keys {
		if k == nil {
			continue
		}
		all |= 1 << i
		if have.sig[i] == "" {
			continue
		}
		der, err := base64.StdEncoding.Strict().DecodeString(have.sig[i])
		if err != nil || !ecdsa.VerifyASN1(k, sum[:], der) {
			bad = because(ErrSignature, "sig%d", i)
			continue
		}
		spki, err := marshalKey(k)
		if err != nil {
			return nil, because(ErrPolicy, "key %d: %w", i, err)
		}
		good |= 1 << i
		distinct[string(spki)] = true
		signers = append(signers, fmt.Sprintf("sig%d %.16s", i, keyID(spki)))
	}
	need := p.need(all)
	switch {
	case good != 0 && good&need == need && len(distinct) >= p.Threshold:
		return signers, nil
	case bad != nil:
		return nil, bad
	}
	return nil, because(ErrUnsigned, "required %#02x and at least %d keys, valid %#02x", need, max(p.Threshold, 1), good)
}

// extraID marks the extra field that carries signatures.
const extraID = 0x293a

// signatures are the signatures in the extra field.
type signatures struct {
	sig  [MaxKeys]string // base64 of DER, or ""
	note []byte          // nil if there is none
}

// noteName is the member that holds the note.
const noteName = "note"

// parseExtra reads the content of that field: a JSON object. A member "note" that
// does not begin as a note about a manifest does is an attribute: mos users have
// such ones.
func parseExtra(b []byte, have *signatures) (attrs []strictjson.Member, err error) {
	if err := strictjson.Check(b); err != nil {
		return nil, because(ErrFormat, "extra field: %w", err)
	}
	ms, err := strictjson.Members(b)
	if err != nil {
		return nil, because(ErrFormat, "extra field: %w", err)
	}
	for _, m := range ms {
		i := slices.Index(sigNames, m.Name)
		if i < 0 {
			if text, err := strictjson.String(m.Value); m.Name == noteName && err == nil && trust.IsManifestNote([]byte(text)) {
				have.note = []byte(text)
				continue
			}
			if err := variant(m.Name, sigNames, noteName); err != nil {
				return nil, because(ErrFormat, "extra field: %w", err)
			}
			attrs = append(attrs, m)
			continue
		}
		if have.sig[i], err = strictjson.String(m.Value); err == nil && have.sig[i] == "" {
			err = errors.New("empty")
		}
		if err != nil {
			return nil, because(ErrSignature, "sig%d: %w", i, err)
		}
	}
	return attrs, nil
}

var sigNames = []string{"sig0", "sig1", "sig2", "sig3", "sig4", "sig5", "sig6", "sig7"}

// testKeys are the digests of keys published with their private halves.
var testKeys = []string{
	"5e9f7fe4685bc5c19c58ded22bec56a62dd6dffd3ff24a9f24ee604ae3cd9403", // testdata/k0.pub.pem
	"970ec7234fc26df0bc636f4e464407db3644c54643497bf521883ce02e69f99a", // testdata/k2.pub.pem
}

// spkiP256 precedes the uncompressed point in a SubjectPublicKeyInfo of a
// P-256 key (RFC 5480, section 2).
var spkiP256 = []byte{
	0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01,
	0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
}

// marshalKey returns the DER SubjectPublicKeyInfo of a P-256 key.
func marshalKey(k *ecdsa.PublicKey) ([]byte, error) {
	if k.Curve != elliptic.P256() || k.X == nil || k.Y == nil {
		return nil, errors.New("not a P-256 key")
	}
	point, err := k.Bytes()
	if err != nil {
		return nil, err
	}
	return slices.Concat(spkiP256, point), nil
}

func keyID(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// KeyID returns the SHA-256 of the DER SubjectPublicKeyInfo of a P-256 key in
// hexadecimal digits. [ota.ImageInfo].SignedBy has the first 16 of them.
func KeyID(k *ecdsa.PublicKey) (string, error) {
	if k == nil {
		return "", because(ota.ErrInvalid, "no key")
	}
	der, err := marshalKey(k)
	if err != nil {
		return "", because(ota.ErrInvalid, "%w", err)
	}
	return keyID(der), nil
}

// ParseKey reads a P-256 public key: a PEM block "PUBLIC KEY", or what
// update.key0 of Mongoose OS holds, the base64 form of the DER
// SubjectPublicKeyInfo. Errors wrap [ota.ErrInvalid].
func ParseKey(b []byte) (*ecdsa.PublicKey, error) {
	var der []byte
	if block, rest := pem.Decode(b); block != nil {
		if block.Type != "PUBLIC KEY" || len(bytes.TrimSpace(rest)) > 0 {
			return nil, because(ota.ErrInvalid, "not a single PEM block of a public key")
		}
		der = block.Bytes
	} else {
		var err error
		if der, err = base64.StdEncoding.Strict().DecodeString(string(bytes.TrimSpace(b))); err != nil {
			return nil, because(ota.ErrInvalid, "neither PEM nor base64")
		}
	}
	point, ok := bytes.CutPrefix(der, spkiP256)
	if !ok {
		return nil, because(ota.ErrInvalid, "not a P-256 public key")
	}
	k, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), point)
	if err != nil {
		return nil, because(ota.ErrInvalid, "%w", err)
	}
	return k, nil
}
