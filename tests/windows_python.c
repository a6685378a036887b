/* python.exe: hands its arguments to the interpreter in python311.dll beside it. */
#include <stdio.h>
#include <windows.h>

typedef int (*py_main)(int, wchar_t **);

int wmain(int argc, wchar_t **argv)
{
    HMODULE library = LoadLibraryW(L"python311.dll");
    py_main run = library ? (py_main)(void *)GetProcAddress(library, "Py_Main") : NULL;
    if (run == NULL) {
        fprintf(stderr, "python.exe: python311.dll cannot be loaded (error %lu)\n", GetLastError());
        return 1;
    }
    return run(argc, argv);
}
