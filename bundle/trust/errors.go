package trust

import (
	"errors"
	"fmt"

	"github.com/slotota/ota"
)

// sentinel is an error value that is also another one.
type sentinel struct {
	text string
	is   error
}

func (s *sentinel) Error() string { return s.text }
func (s *sentinel) Unwrap() error { return s.is }

// Sentinel errors, for [errors.Is].
var (
	ErrKey      error = &sentinel{"not a usable key", ota.ErrInvalid}
	ErrFormat         = errors.New("malformed")
	ErrTooLarge error = &sentinel{"too large", ota.ErrTooLarge}
	ErrRecord         = errors.New("the trust record contradicts itself")

	// ErrSignature is about a line that names a key that counts, but whose
	// signature is wrong.
	ErrSignature error = &sentinel{"the signature does not verify", ota.ErrUnverified}
	// ErrText is about a note that names another manifest.
	ErrText error = &sentinel{"the note is about another manifest", ota.ErrUnverified}
	// ErrUnsigned is about too few valid signatures.
	ErrUnsigned error = &sentinel{"too few signatures", ota.ErrUnverified}
	// ErrUnknownKey is the ErrUnsigned where all signatures are by other keys.
	ErrUnknownKey error = &sentinel{"no signature is by a key that counts", ErrUnsigned}

	ErrVersion = errors.New("the trust record does not have the next version")
	ErrOld     = errors.New("the trust record is not newer")
	ErrFork    = errors.New("there are two trust records of the same version")
	ErrExpired = errors.New("the trust record has expired")
)

// because adds the particulars to a sentinel.
func because(sentinel error, format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{sentinel}, args...)...)
}
