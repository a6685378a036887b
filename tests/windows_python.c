/* python.exe: hands its arguments to the interpreter in python311.dll beside it.

   Compiled with -DHOME=L"..." it runs the script that lies beside it (NAME.exe and
   NAME.py); the interpreter and its library are those of the folder HOME. */
#include <stdio.h>
#include <stdlib.h>
#include <windows.h>

typedef int (*py_main)(int, wchar_t **);

static HMODULE library(void)
{
#ifdef HOME
    HMODULE found = LoadLibraryExW(HOME L"\\python311.dll", NULL, LOAD_WITH_ALTERED_SEARCH_PATH);
    void (*set_home)(const wchar_t *) =
        found ? (void (*)(const wchar_t *))(void *)GetProcAddress(found, "Py_SetPythonHome") : NULL;
    if (set_home)
        set_home(HOME);
    return found;
#else
    return LoadLibraryW(L"python311.dll");
#endif
}

int wmain(int argc, wchar_t **argv)
{
    HMODULE python = library();
    py_main run = python ? (py_main)(void *)GetProcAddress(python, "Py_Main") : NULL;
    if (run == NULL) {
        fprintf(stderr, "%ls: python311.dll cannot be loaded (error %lu)\n", argv[0],
                GetLastError());
        return 1;
    }
#ifdef HOME
    wchar_t script[MAX_PATH + 1];
    wchar_t **longer = calloc(argc + 4, sizeof *longer);
    DWORD length = GetModuleFileNameW(NULL, script, MAX_PATH);
    if (longer == NULL || length < 4 || length >= MAX_PATH)
        return 1;
    wcscpy(script + length - 4, L".py");
    longer[0] = argv[0];
    longer[1] = L"-I"; /* no site-packages, no variables: it starts often, and sooner so */
    longer[2] = L"-S";
    longer[3] = script;
    for (int i = 1; i < argc; i++)
        longer[i + 3] = argv[i];
    argv = longer;
    argc += 3;
#endif
    return run(argc, argv);
}
