//go:build !linux

package soak_test

import (
	"os"
	"testing"
)

func openPTY(t *testing.T) (line func() (*os.File, error), port string, closeLine func()) {
	t.Skip("needs the pseudo terminals of Linux")
	return nil, "", nil
}
