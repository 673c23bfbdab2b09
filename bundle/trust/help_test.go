package trust

import (
	"crypto"
	"crypto/ed25519"
	"io"
)

// brokenModule is a key module that does not do what it should.
type brokenModule struct {
	pub ed25519.PublicKey
	sig []byte
	err error
}

func (b brokenModule) Public() crypto.PublicKey                                  { return b.pub }
func (b brokenModule) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return b.sig, b.err }

// rsaKey is a key of another kind.
type rsaKey struct{}

func (rsaKey) Public() crypto.PublicKey                                  { return "rsa" }
func (rsaKey) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, nil }
