//go:build !linux

package serial

import "errors"

// hardwareFlow is for Linux only: the serial library has no means for it.
func hardwareFlow(string) (func() error, error) { return nil, errors.ErrUnsupported }
